"""Compiling for TPUs here, and reading what the compiler wrote. A listing of a small kernel lies in
tpu_listing/."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.dispatch import devices
from kernels_pallas.tools import hlo, tpu_bundles, tpu_compile

LISTING = Path(__file__).parent / "tpu_listing"
X, W = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 128), (128, 128)))


def _accumulate(x, w, name="my_kernel", grid=4):
    """What the listing is of: a running sum of x w over four steps, then tanh 10 x 3 times."""

    def kernel(x, w, o, s):
        @pl.when(pl.program_id(0) == 0)
        def _():
            s[...] = jnp.zeros_like(s)

        s[...] += jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

        def outer(i, carry):
            s[...] = jax.lax.fori_loop(0, 3, lambda j, c: jnp.tanh(c), s[...])
            return carry

        jax.lax.fori_loop(0, 10, outer, 0)
        o[...] = s[...].astype(o.dtype)

    rows = x.shape[0] // grid
    return pl.pallas_call(
        kernel,
        grid=(grid,),
        in_specs=[
            pl.BlockSpec((rows, 128), lambda i: (i, 0)),
            pl.BlockSpec((128, 128), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((rows, 128), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name=name,
    )(x, w)


@pytest.mark.parametrize("part", tpu_compile.PARTS)
def test_compiles_for_every_part(part):
    def function(x, w):
        assert devices.current() == ("tpu", tpu_compile.PARTS[part].device_kind)
        return _accumulate(x, w)

    compiled = tpu_compile.compile_for(part, function, X, W)
    assert compiled.memory.argument_size_in_bytes == 2 * (X.size + W.size)
    (listing,) = compiled.listings.values()
    assert 0 < listing.vmem_bytes < tpu_compile.PARTS[part].vmem_bytes
    assert tpu_compile.devices(part)[0].device_kind == tpu_compile.PARTS[part].device_kind


def test_parts_are_what_jax_knows():
    for name, part in tpu_compile.PARTS.items():
        info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name.removeprefix("tpu")), part.cores)
        assert info.vmem_capacity_bytes == part.vmem_bytes
        assert (info.mxu_column_size, info.num_mxus) == part.mxu
        # JAX counts HBM and FLOP/s by the core, and rounds them
        assert part.hbm_bytes / part.cores == pytest.approx(info.hbm_capacity_bytes, rel=0.02)
        peak = part.bf16_flops_per_second / part.cores
        assert peak == pytest.approx(info.bf16_ops_per_second, rel=0.01)
        if part.clock_hz:
            edge, units = part.mxu
            flops = 2 * part.cores * units * edge**2 * part.clock_hz
            assert flops == pytest.approx(part.bf16_flops_per_second, rel=0.01)


def test_errors_name_the_choices(monkeypatch):
    with pytest.raises(ValueError, match="unknown TPU topology 'v9'; give one of v5e, v5p, v6e"):
        tpu_compile.compile_for("v9", lambda x: x, X)
    with pytest.raises(ValueError, match="libtpu knows no slice 'v6e:3x3'"):
        tpu_compile.compile_for("v6e:3x3", lambda x: x, X)
    monkeypatch.setattr(tpu_compile, "_DUMP", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[tpu\]'"):
        tpu_compile.devices("v6e")


@pytest.mark.slow
def test_too_much_vmem_raises():
    def copy(x, o):
        o[...] = x[...] + 1

    def function(x):
        return pl.pallas_call(copy, out_shape=x, name="copy")(x)

    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        tpu_compile.compile_for("v6e", function, jax.ShapeDtypeStruct((1 << 16, 1024), jnp.float32))


@pytest.mark.slow
def test_several_processes_compile_at_once():
    code = (
        "import jax, jax.numpy as jnp; from kernels_pallas.tools import tpu_compile as t; import time\n"
        "for _ in range(5): t.compile_for('v6e', lambda x: x @ x, jax.ShapeDtypeStruct((128, 128), jnp.float32))\n"
        "time.sleep(3)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_reads_a_listing():
    """Counted by hand in the file: 6 bundles before the grid loop, 10 rounds of a loop around 3
    rounds of another."""
    loops = tpu_bundles.read_loops((LISTING / "final_bundles.txt").read_text(), steps=4)
    assert loops.grid_trips == 4
    assert not loops.in_grid[:6].any() and loops.in_grid[6]
    assert sorted(set(loops.times.tolist())) == [1, 10, 30]
    assert (loops.times == 30).sum() == 9
    capacity, used = tpu_bundles.read_utilization((LISTING / "utilization.txt").read_text())
    assert capacity["MXU"] == 2 and capacity["VLOAD"] == 3
    assert len(used["MXU"]) == len(loops.times) == 149
    assert used["MXU"].sum() > 0 and used["VSTORE:SPILL"].sum() == 0


def test_measures_a_kernel():
    program = tpu_bundles.measure("v6e", lambda x, w: jnp.sin(_accumulate(x, w)), X, W)
    (kernel,) = program.kernels
    assert (kernel.name, kernel.grid, kernel.steps) == ("my_kernel", (4,), 4)
    # tanh alone: 2 registers, 30 times
    assert kernel.step_cycles > kernel.bundles > 60
    assert kernel.cycles >= 4 * kernel.step_cycles
    assert 0 < kernel.mxu_share < 1
    assert kernel.spills == kernel.spill_share == 0
    # w comes once, x and the result by the step
    assert kernel.hbm_bytes == kernel.least_hbm_bytes == 2 * (2 * X.size + W.size)
    assert program.cycles > kernel.cycles


def test_counts_blocks_that_are_fetched_again():
    def function(x):
        return pl.pallas_call(
            lambda x, o: o.__setitem__(..., x[...]),
            grid=(2, 4),
            in_specs=[pl.BlockSpec((8, 128), lambda i, j: (j, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((16, 512), jnp.float32),
            name="again",
        )(x)

    (kernel,) = tpu_bundles.measure(
        "v6e", function, jax.ShapeDtypeStruct((32, 128), jnp.float32)
    ).kernels
    assert kernel.least_hbm_bytes == 4 * (32 * 128 + 16 * 512)
    assert kernel.hbm_bytes == 4 * (2 * 32 * 128 + 16 * 512)


def test_kernels_need_names_of_their_own():
    def function(x, w):
        return _accumulate(x, w) + _accumulate(x, w, grid=2)

    with pytest.raises(ValueError, match="2 different pallas_calls; give each a name="):
        tpu_bundles.measure("v6e", function, X, W)


def test_loops_of_xla_count_as_often_as_they_run():
    def cycles(length):
        def function(x):
            return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=length)[0]

        x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
        program = tpu_bundles.measure("v6e", function, x)
        assert program.hbm_bytes is None
        return program.xla_cycles

    assert cycles(200) / cycles(100) == pytest.approx(2, rel=0.1)


def test_bytes_of_xla_are_operands_and_results():
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    program = tpu_bundles.measure("v6e", lambda x: jnp.tanh(x) * 2, x)
    np.testing.assert_allclose(program.hbm_bytes, 2 * 4 * x.size, rtol=0.01)
    assert program.least_hbm_bytes == 2 * 4 * x.size


def test_bytes_of_prefetches_are_those_of_their_slices():
    """Half of x comes to VMEM as a slice, y whole; the kernel reads both there and writes its
    result to HBM."""
    module = hlo.HloModule("""
ENTRY %main (x: f32[1024], y: f32[512]) -> f32[512] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %y = f32[512]{0:T(1024)} parameter(1)
  %slice-start = ((f32[1024]{0:T(1024)}), f32[512]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:512]}
  %slice-done = f32[512]{0:T(1024)S(1)} slice-done(%slice-start)
  %copy-start = (f32[512]{0:T(1024)S(1)}, f32[512]{0:T(1024)}, u32[]{:S(2)}) copy-start(%y)
  %copy-done = f32[512]{0:T(1024)S(1)} copy-done(%copy-start)
  %k.1 = f32[512]{0:T(1024)} custom-call(%slice-done, %copy-done), custom_call_target="tpu_custom_call"
  ROOT %neg = f32[512]{0:T(1024)} negate(%k.1)
}
""")
    read_ahead, in_vmem, negated = 2 * 4 * 512, 2 * 4 * 512, 2 * 4 * 512
    assert tpu_bundles.xla_bytes(module) == read_ahead - in_vmem + negated
    assert tpu_bundles.unestimated_bytes(module) == negated


def test_a_slice_and_an_update_in_place_move_what_they_touch():
    module = hlo.HloModule("""
ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %zero = s32[] constant(0)
  %neg = f32[1024]{0:T(1024)} negate(%x)
  %slice = f32[8]{0:T(1024)} slice(%x), slice={[0:8]}
  ROOT %update = f32[1024]{0:T(1024)} dynamic-update-slice(%neg, %slice, %zero)
}
""")
    assert tpu_bundles.xla_bytes(module) == 2 * 4 * 1024 + 2 * 4 * 8 + 2 * 4 * 8


def test_cycles_of_loops_and_of_the_dearest_branch():
    module = hlo.HloModule("""
%cheap (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %one = f32[8]{0} negate(%a), backend_config={"estimated_cycles":"5"}
}

%dear (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  ROOT %other = f32[8]{0} exponential(%b), backend_config={"estimated_cycles":"70"}
}

%body (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %either = f32[8]{0} conditional(%i, %c, %c), branch_computations={%cheap, %dear}
}

%test (d: f32[8]) -> pred[] {
  %d = f32[8]{0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %w = f32[8]{0} while(%x), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
""")
    assert tpu_bundles.xla_cycles(module) == 3 * 70
    assert tpu_bundles.xla_bytes(module) is None
