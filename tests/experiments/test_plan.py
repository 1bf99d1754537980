"""The plan: what a compiled program sends and takes, the model of a slice's links and time, what is
refused, and one config from end to end."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from configs import gated_delta_net_1300m
from experiments.planning import candidates, collectives, compiled, estimate, parts, report
from kernels_pallas.tools import hlo
from seqmodels import sharding


@functools.cache
def slice_of(topology):
    return parts.find(topology)


def mesh_of(where, **sizes):
    return sharding.make_mesh({"data": 1} | sizes, where.devices)


def test_collectives_and_dots_of_a_compiled_program_with_loops():
    def local(w, x):
        def layer(x, w):
            return jnp.tanh(x @ lax.all_gather(w, "fsdp", tiled=True)), None

        x, _ = lax.scan(layer, x, w)
        for pair in ((0, 1), (1, 0)):  # two messages, of which each device receives one
            x = x + lax.ppermute(x * 2, "seq", [pair])
        return lax.psum(x, ("data", "seq"))

    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "seq": 2})
    both = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(None, "fsdp"), P("data", "seq")),
        out_specs=P(),
        check_vma=False,
    )
    shapes = (
        jax.ShapeDtypeStruct((5, 64, 64), jnp.float32),
        jax.ShapeDtypeStruct((16, 2, 64), jnp.float32),
    )
    text = jax.jit(both).lower(*shapes).compile().as_text()
    module, where = hlo.HloModule(text), slice_of("v6e:2x4")
    planned = mesh_of(
        where, data=2, fsdp=2, seq=2
    )  # the same positions, of devices that have places
    found = [
        c for v in module.visits() if (c := collectives.read(v, module, planned, where)) is not None
    ]
    rows = {
        (r["kind"], r["axes"]): (r["devices"], r["times a step"], r["bytes received"])
        for r in collectives.grouped(found)
    }
    matrix, x = 64 * 64 * 4, 8 * 1 * 64 * 4
    assert rows == {
        ("all-gather", "fsdp"): (2, 5, 5 * matrix // 2),
        ("collective-permute", "seq"): (2, 2, x),
        ("all-reduce", "data+seq"): (4, 1, 2 * x * 3 // 4),
    }
    assert sum(v.times * hlo.flops(module, v) for v in module.visits()) == 5 * 2 * 8 * 64 * 64


HLO = """HloModule step, is_scheduled=true

%inner (a: f32[4,1024], i: s32[]) -> f32[1,1024] {
  %a = f32[4,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %one = f32[1,1024]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,1024}
}

%fused (a.1: f32[4,1024], i.1: s32[]) -> f32[1024] {
  %a.1 = f32[4,1024]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %of_layer = f32[1,1024]{1,0} fusion(%a.1, %i.1), kind=kLoop, calls=%inner
  ROOT %flat = f32[1024]{0} bitcast(%of_layer)
}

%condition (s: (s32[], bf16[1024,1024])) -> pred[] {
  %s = (s32[], bf16[1024,1024]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

%body (s.1: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %s.1 = (s32[], bf16[1024,1024]{1,0}) parameter(0)
  %n.1 = s32[]{S(6)} get-tuple-element(%s.1), index=0
  %x = bf16[1024,1024]{1,0} get-tuple-element(%s.1), index=1
  %y = bf16[1024,1024]{1,0:T(8,128)S(1)} copy(%x)
  %start = (bf16[512,1024]{1,0}, bf16[1024,1024]{1,0}) all-gather-start(%part), replica_groups={{0,1},{2,3}}, dimensions={0}
  %product = bf16[1024,1024]{1,0:T(8,128)S(1)} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = bf16[1024,1024]{1,0} all-gather-done(%start)
  %part = bf16[512,1024]{1,0} slice(%done), slice={[0:512], [0:1024]}
  %two = s32[]{S(6)} constant(2)
  %copied = s32[]{S(6)} copy(%n.1)
  %next = s32[]{S(6)} add(%copied, %two)
  ROOT %t = (s32[], bf16[1024,1024]{1,0}) tuple(%next, %done)
}

ENTRY %main (p: f32[4,1024], weights: bf16[1024,1024]) -> f32[1024] {
  %p = f32[4,1024]{1,0} parameter(0)
  %weights = bf16[1024,1024]{1,0} parameter(1)
  %one.1 = s32[] constant(1)
  %q = (s32[], bf16[1024,1024]{1,0}) tuple(%one.1, %weights)
  %zero = s32[] constant(0)
  %loop = (s32[], bf16[1024,1024]{1,0}) while(%q), condition=%condition, body=%body
  %kernel.1 = f32[1024]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %sliced = f32[1024]{0} fusion(%p, %zero), kind=kLoop, calls=%fused
}
"""


def test_the_estimates_arithmetic():
    where = slice_of("v6e:2x2")
    module = hlo.HloModule(HLO)  # whose loop counts from 1 by 2 to 7
    machine = estimate.Machine(where, mesh_of(where, fsdp=2, data=2), {"kernel": 9.18e8})
    cost = estimate.cost(module, machine)
    peak, bandwidth = 918e12, 1640e9
    dot, matrix = 2 * 1024**3, 2 * 1024**2
    assert cost.flops == 3 * dot + 9.18e8 and cost.kernel_flops == 9.18e8
    # The copy reads HBM and writes VMEM; the gather has its operand and result there, the slice
    # reads what it keeps.
    loop = matrix + (matrix // 2 + matrix) + 2 * (matrix // 2)
    sliced, kernel = 2 * 4 * 1024 + 4, 4 * 4 * 1024 + 4 * 1024  # one row, the index; whole operands
    assert cost.hbm_bytes == 3 * loop + sliced + kernel
    gather = (matrix / 2) / 90e9  # half of the result over one link of a line of two
    waits = gather - dot / peak
    assert cost.communication_seconds == pytest.approx(3 * gather)
    assert cost.waiting_seconds == pytest.approx(3 * waits)
    operations = 3 * (dot / peak + matrix / bandwidth + matrix / bandwidth)
    operations += sliced / bandwidth + 9.18e8 / (estimate.KERNEL_SHARE * peak)
    assert cost.compute_seconds == pytest.approx(operations)
    assert cost.seconds == pytest.approx(operations + 3 * waits)

    # Where the part's clock is known, the compiler's cycles count: here of the fusion, a million
    # more than anything else.
    cycles = HLO.replace(
        "calls=%fused", 'calls=%fused, backend_config={"estimated_cycles":"1000000"}'
    )
    where = slice_of("v5p:2x2x1")
    machine = estimate.Machine(where, mesh_of(where, fsdp=2, data=2), {})
    without, cost = (estimate.cost(hlo.HloModule(text), machine) for text in (HLO, cycles))
    assert cost.compiler_cycles == 1e6
    assert cost.seconds - without.seconds == pytest.approx(1e6 / 1.75e9 - sliced / 2765e9)


def test_links_of_a_group():
    link = 90e9
    line, ring = slice_of("v6e:4x4"), slice_of("v6e:16x16")
    assert ring.closes(0) and not line.closes(0)

    def group(where, *places):
        at = {tuple(d.coords[:2]): d for d in where.devices}
        return parts.group_bandwidth(where, [at[place] for place in places])

    assert group(line, *((i, 0) for i in range(4))) == (link, 3)
    assert group(ring, *((i, 0) for i in range(16))) == (2 * link, 8)
    assert group(ring, *((i, 0) for i in range(4))) == (link, 3)  # part of a ring is a line
    assert group(ring, *((4 * i, 0) for i in range(4))) == (
        2 * link / 4,
        8,
    )  # shared with three more
    assert group(line, *((i, j) for i in range(4) for j in range(4))) == (2 * link, 6)
    assert group(line, (0, 0), (1, 1)) == (link, 2)  # no box
    cube = slice_of("v5p:4x4x8")
    assert all(map(cube.closes, range(3))) and not slice_of("v5p:2x4x4").closes(1)
    halves = slice_of("tpu7x:2x2x1")  # two devices a chip, which share its links
    assert parts.group_bandwidth(halves, halves.devices[:2]) == (6 * link / 2, 1)
    assert parts.hops(ring, ring.devices[0], ring.devices[-1]) == 2


def test_kernels_count_their_own_dots():
    from jax.experimental import pallas as pl

    def body(x_ref, y_ref, o_ref):
        def add(i, total):
            return total + jnp.dot(x_ref[...], y_ref[...])

        o_ref[...] = lax.fori_loop(0, 3, add, jnp.zeros_like(o_ref))

    spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
    whole = pl.BlockSpec((8, 8), lambda i: (0, 0))
    call = pl.pallas_call(
        body, grid=(4,), in_specs=[spec, whole], out_specs=spec, name="my_kernel",
        out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32), interpret=True,
    )  # fmt: skip
    jaxpr = jax.make_jaxpr(jax.vmap(call, in_axes=(0, None)))(
        jnp.ones((2, 32, 8)), jnp.ones((8, 8))
    )
    assert compiled.kernel_flops(jaxpr.jaxpr) == {"my_kernel": 2 * 4 * 3 * 2 * 8**3}
    assert estimate.kernel_flops("jvp_my_kernel_.12", {"kernel": 1.0, "my_kernel": 2.0}) == 2.0
    assert estimate.kernel_flops("other.1", {"kernel": 1.0}) == 0.0


ROW = {
    "topology": "v6e:2x2", "devices": 4, "mesh": {"data": 4}, "collective": None, "zero": 0, "remat": "none",
    "batch_size": 64, "seq_len": 128, "accumulate": 1, "hbm_bytes_a_device": 32 << 30,
    "state_bytes": {"parameters": 8 << 30, "optimizer": 16 << 30}, "needed_bytes": 40 << 30,
    "pattern": "gla", "parameters": 10, "compile_seconds": 1.0, "compile_cpu_seconds": 1.0,
}  # fmt: skip


def test_what_does_not_fit_says_by_how_much_and_what_to_change(tmp_path):
    said = report.verdict(ROW | {"usable_bytes": 31 << 30})
    assert said.startswith("does not fit: 40.0 GiB, 9.0 more than a device has")
    assert "remat=full" in said and "accumulate=4" in said and "parallel.zero=3" in said
    assert "does not fit" in report.text(ROW)
    report.save(tmp_path, "python -m experiments.plan", [ROW], [])
    larger = ROW | {"batch_size": 32, "parameters": 20}  # another model of the same pattern
    new = [ROW, ROW | {"batch_size": 32}, larger]
    report.save(tmp_path, "again", new, ["fsdp=4: too large"])
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert [(r["batch_size"], r["parameters"], r["command"]) for r in kept["plans"]] == [
        (32, 10, "again"),
        (32, 20, "again"),
        (64, 10, "again"),
    ]
    assert "DOES NOT FIT" in (tmp_path / "tables.md").read_text()
    # Six rows a device; 31 GiB where there is room for 8: four pieces, but 4 does not divide 6.
    few = ROW | {"batch_size": 24, "needed_bytes": 55 << 30}
    assert "accumulate=6:" in report.verdict(few)
    long = ROW | {"batch_size": 4, "remat": "full", "state_bytes": {"parameters": 1 << 30}}
    assert report.advice(long)[0].startswith("a larger seq axis")
    fits = ROW | {"needed_bytes": 30 << 30, "estimate": {"tokens_per_second": 1.0}}
    assert report.verdict(fits) == "fits: 30.0 of 32 GiB per device"
    assert sorted([ROW, fits], key=report.rank)[0] is fits


def test_plans_of_older_versions_are_kept(tmp_path):
    """Their collective was called an exchange."""
    old = {"exchange" if name == "collective" else name: value for name, value in ROW.items()}
    plans = [old | {"command": "old", "batch_size": size} for size in (64, 32)]
    (tmp_path / "plan.json").write_text(json.dumps({"plans": plans, "left_out": []}))
    report.save(tmp_path, "new", [ROW], [])
    kept = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert [(row["batch_size"], row["command"]) for row in kept] == [(32, "old"), (64, "new")]
    assert all("collective" in row and "exchange" not in row for row in kept)


def test_mistakes_are_found_before_compiling():
    config, where = gated_delta_net_1300m.get_config(), slice_of("v6e:2x2")
    with pytest.raises(ValueError, match="v6e comes in 2x2, 2x4"):
        parts.find("v6e:3x3")
    with pytest.raises(ValueError, match="give one of v5e, v5p"):
        parts.find("h100:2x2")
    for text in ("dta=8", "data", "data=--8", "data=2,data=2", "data=\N{SUPERSCRIPT TWO}"):
        with pytest.raises(ValueError, match="such as data=8,fsdp=16; the axes are pipe, data"):
            candidates.parse_mesh(text)
    assert candidates.parse_mesh("fsdp=-1,seq=2") == dict(pipe=1, data=1, fsdp=-1, seq=2, tensor=1)
    with pytest.raises(ValueError, match="does not fit 4 devices"):
        candidates.make(config, where, candidates.parse_mesh("fsdp=8"))
    with pytest.raises(ValueError, match="not divisible by 4"):
        candidates.make(config, where, candidates.parse_mesh("fsdp=-1"), batch_size=6)
    with config.unlocked():
        learned = config.copy_and_resolve_references()
        learned.model.learned_positions = 1024
    with pytest.raises(ValueError, match="rows of 4096 tokens, and the model has learned 1024 pos"):
        candidates.make(learned, where, candidates.parse_mesh("fsdp=-1"))
    with pytest.raises(ValueError, match="a product of some of the slice's dimensions 2 x 4 x 4"):
        candidates.make(config, slice_of("v5p:2x4x4"), candidates.parse_mesh("data=2,fsdp=8,seq=2"))
    with pytest.raises(ValueError, match="a product of some of the slice's dimensions 2 x 4 x 4"):
        mesh = candidates.parse_mesh("data=2,fsdp=8,seq=2")
        candidates.make(config, slice_of("v5p:2x4x4"), mesh, tokens_per_device=1024)
    long = candidates.make(config, where, candidates.parse_mesh("fsdp=2,seq=2"), "ring", None, 1024)
    assert (long.config.data.batch_size, long.config.data.seq_len) == (2, 2048)
    row = compiled.described(long)
    assert row["mesh"] == {"fsdp": 2, "seq": 2} and row["collective"] == "ring"
    # 1.3 billion parameters and two moments of each, in float32, in halves.
    assert row["state_bytes"]["parameters"] == pytest.approx(4 * row["parameters"] / 2, rel=0.01)
    assert row["state_bytes"]["optimizer"] == pytest.approx(8 * row["parameters"] / 2, rel=0.01)


@pytest.mark.slow
def test_a_small_config_from_end_to_end(tmp_path):
    (tmp_path / "config.py").write_text(
        "from tests.experiments import tiny\nfrom pathlib import Path\n"
        f"def get_config(arg=''):\n    config = tiny.make_config(Path({str(tmp_path)!r}))\n"
        "    config.model.update({'vocab_size': 256, 'num_layers': 2, 'd_model': 128, 'd_ff': 256,\n"
        "        'pattern': 'retnet(num_heads=2)'})\n"
        "    config.data.update({'seq_len': 128})\n    return config\n"
    )
    command = [sys.executable, "-m", "experiments.plan", f"--config={tmp_path / 'config.py'}"]
    command += ["--topology=v6e:2x2"]
    refused = subprocess.run([*command, "--mesh=fsdp=3"], capture_output=True, text=True)
    assert refused.returncode == 2 and "does not fit 4 devices" in refused.stderr
    out = tmp_path / "plan"
    done = subprocess.run(
        [*command, "--mesh=fsdp=2,seq=2", f"--out={out}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout and "MFU" in done.stdout
    (row,) = json.loads((out / "plan.json").read_text())["plans"]
    assert row["loops_counted_once"] == []
    # Each device does its part of 6 FLOPs per parameter and token, and the recurrence's.
    assert row["parameters"] > 3 * 2 * 128 * 256 and 4 * row["flops"] > 0.97 * row["model_flops"]
    # Every layer's weights are gathered forward and backward, and their gradients come back.
    by_axis = {(c["kind"], c["axes"]): c for c in row["collectives"]}
    assert by_axis["all-gather", "fsdp"]["times a step"] >= 4
    assert any("seq" in axes for _, axes in by_axis)
    assert (out / "memory.png").stat().st_size > 1000 and "| topology |" in (
        out / "tables.md"
    ).read_text()
