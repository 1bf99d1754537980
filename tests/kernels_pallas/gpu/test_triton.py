"""Tests the Triton kernels: the conformance suite through Triton's interpreter, and compilation for
GPUs that are not in this machine."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import static_triton
from kernels_pallas import delta_rule, diagonal_scan, linear_attention
from kernels_pallas.dispatch import devices, tuning
from kernels_pallas.gpu import launch as gpu_launch
from kernels_pallas.ops.delta_rule.gpu import launch
from tests.kernels_pallas.ops import (
    test_delta_rule,
    test_diagonal_scan,
    test_document_sums,
    test_linear_attention,
)
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    Shape,
    Suite,
    SuiteCase,
    assert_close,
    documents,
    everything,
    inputs_of,
    truth,
)


class Interpreted(Suite):
    """Runs the suite with implementation='triton' on part of its lengths and regimes, for a program
    takes milliseconds in the interpreter.

    The case's `fast` pairs run in the fast suite, with documents; `slow` ones and the structural
    tests do not. Most slow pairs run packed and in bfloat16 only: one of the packed rows is one
    document.
    """

    slow: tuple[tuple[int, str], ...]

    test_what_is_not_finite_stays_apart = None  # kernels multiply by a mask

    def pytest_generate_tests(self, metafunc):
        cls, names = metafunc.cls, metafunc.fixturenames
        if "implementation" in names:
            metafunc.parametrize("implementation", cls.case.implementations)
        if "length_and_regime" in names:
            packed = metafunc.function.__name__ == "test_float32_packed_documents"
            marks = () if packed else pytest.mark.slow
            pairs = [
                pytest.param(pair, id=f"T{pair[0]}-{pair[1]}", marks=marks)
                for pair in cls.case.fast
            ]
            for n, pair in enumerate(cls.slow):
                marks = [pytest.mark.slow]
                if n >= (1 if metafunc.function.__name__ == "test_float32" else 3):
                    marks.append(pytest.mark.exhaustive)
                pairs.append(pytest.param(pair, id=f"T{pair[0]}-{pair[1]}", marks=marks))
            metafunc.parametrize("length_and_regime", pairs)
        if "typical" in names:
            marks = [pytest.mark.slow]
            if metafunc.function.__name__ not in (
                "test_packed_equals_separate",
                "test_grouped_heads",
            ):
                marks.append(pytest.mark.exhaustive)
            marked = [pytest.param(x, marks=marks) for x in cls.case.typical]
            metafunc.parametrize("typical", marked)


def _triton(case: SuiteCase, typical: str, fast) -> SuiteCase:
    return dataclasses.replace(case, implementations=("triton",), typical=(typical,), fast=fast)


class TestDocumentSums(Interpreted, test_document_sums.TestDocumentSums):
    case = _triton(test_document_sums.CASE, "blocks of 7", ((100, "blocks of 7"),))
    slow = ((100, "whole"),)


class TestLinearAttention(Interpreted):
    case = _triton(test_linear_attention.CASE, "per_token weak", ((63, "per_token mixed"),))
    slow = (
        *((1, "per_token weak"), (64, "none"), (100, "per_head"), (128, "per_token strong")),
        *((100, "per_token resets"), (100, "per_channel extreme"), (128, "per_channel mixed")),
        *((63, "per_channel strong"), (100, "per_channel resets"), (100, "per_channel weak")),
    )


class TestDeltaRule(Interpreted):
    case = _triton(test_delta_rule.DELTA_RULE, "per_token weak", ((63, "per_token mixed"),))
    slow = (
        *((1, "beta 1"), (64, "none"), (100, "one key, beta 2"), (100, "beta 2")),
        *((100, "repeated keys, any beta"), (100, "long keys"), (128, "per_token strong")),
        *((100, "per_token resets"), (100, "per_channel extreme"), (64, "per_channel mixed")),
    )


class TestDiagonalScan(Interpreted):
    case = _triton(test_diagonal_scan.CASE, "weak", ((63, "log resets"), (100, "growing")))
    slow = ((1, "weak"), (64, "any sign"), (100, "fixed"), (128, "log"), (100, "log strong"))


@pytest.mark.slow
def test_reverse_scan():
    case = dataclasses.replace(
        TestDiagonalScan.case,
        call=lambda x, **kw: test_diagonal_scan.CASE.call(x, reverse=True, **kw),
    )
    inputs, ids = inputs_of(case, Shape(T=100), "log resets"), documents(2, 100)
    with devices.interpreted():
        got = everything(case, "triton", inputs, ids)
    assert_close(got, truth(case, inputs, ids), TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator, regime, K, V",
    [
        ("linear_attention", "per_channel mixed", 20, 144),
        ("delta_rule", "per_token mixed", 96, 40),
        pytest.param("linear_attention", "per_channel mixed", 96, 40, marks=pytest.mark.exhaustive),
        pytest.param("delta_rule", "per_token mixed", 20, 144, marks=pytest.mark.exhaustive),
    ],
)
def test_widths_that_are_no_blocks(operator, regime, K, V):
    """K and V are cut into several blocks, the last of them not whole."""
    case = {"linear_attention": TestLinearAttention, "delta_rule": TestDeltaRule}[operator].case
    inputs = inputs_of(case, Shape(B=1, T=70, H=2, G=1, K=K, V=V), regime)
    with devices.interpreted():
        got = everything(case, "triton", inputs)
    assert_close(got, truth(case, inputs), TOLERANCE["float32"])


def _qkv(K=16, V=16, dtype=jnp.float32):
    return [jnp.ones((1, 4, 1, n), dtype) for n in (K, K, V)]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: linear_attention(*_qkv(K=512), implementation="triton"),
            "K and V go to 256; got 512",
        ),
        (
            lambda: linear_attention(*_qkv(), chunk_size=256, implementation="triton"),
            "chunk_size goes to 128; got 256",
        ),
        (
            lambda: delta_rule(
                *_qkv(), jnp.ones((1, 4, 1)), chunk_size=128, implementation="triton"
            ),
            "chunk_size goes to 64; got 128",
        ),
        (
            lambda: diagonal_scan(
                jnp.ones((1, 4, 8), jnp.complex64), jnp.ones(8), implementation="triton"
            ),
            "x is complex64; it takes float32 and bfloat16",
        ),
        (  # CUDA's largest grid
            lambda: jax.eval_shape(
                lambda x: linear_attention(x, x, x, implementation="triton"),
                jax.ShapeDtypeStruct((4096, 1, 16, 16), jnp.float32),
            ),
            "B x H goes to 65535; got 4096 x 16",
        ),
        (
            lambda: jax.eval_shape(
                lambda x: diagonal_scan(x, x, implementation="triton"),
                jax.ShapeDtypeStruct((65536, 1, 8), jnp.float32),
            ),
            "B goes to 65535; got 65536",
        ),
    ],
)
def test_limits_are_named(call, message):
    with devices.interpreted(), pytest.raises(NotImplementedError, match=message):
        call()


def _delta_rule_shapes(K, dtype, decay):
    shapes = [((1, 300, 2, K), dtype)] * 3 + [((1, 300, 2), jnp.float32)]
    shapes += {"none": [], "per_channel": [((1, 300, 2, K), jnp.float32)]}[decay]
    return [jax.ShapeDtypeStruct(*x) for x in shapes]


@contextlib.contextmanager
def _traced_for_a_gpu():
    device = jax.sharding.AbstractDevice("NVIDIA A100", 108, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


@pytest.mark.parametrize(
    "K, dtype, decay, chunk, given, capability, message",
    [  # what fits, in bytes of shared memory: 166912 on sm_80, 232448 on sm_90, 101376 on sm_86
        (64, jnp.float32, "per_channel", 32, None, None, None),
        (128, jnp.float32, "per_channel", 64, 64, None, "of 163: give chunk_size=32"),
        (128, jnp.float32, "per_channel", 64, 64, 9.0, None),
        (128, jnp.float32, "per_channel", 64, 64, 8.6, "of 99: give chunk_size=32"),
        (200, jnp.float32, "per_channel", 16, None, None, None),
        (200, jnp.float32, "per_channel", 32, None, 9.0, None),
        (256, jnp.bfloat16, "per_channel", 32, None, 9.0, None),
        (256, jnp.bfloat16, "none", 64, None, None, None),
        (256, jnp.float32, "none", 64, 64, None, "of 163: give chunk_size=32"),
    ],
)
def test_chunks_fit_shared_memory(K, dtype, decay, chunk, given, capability, message, monkeypatch):
    """A chunk that nobody asked for is halved until it fits; one that was given is refused before
    it compiles."""
    monkeypatch.setattr(devices, "compute_capability", lambda: capability)
    unsupported_reason, form_of = launch.unsupported_reason, launch._form_of
    shapes = _delta_rule_shapes(K, dtype, decay)
    qkv, log_decay = shapes[:3], shapes[4] if decay == "per_channel" else None
    names = ("q_BTGK", "k_BTGK", "v_BTHV")
    call = dict(zip(names, qkv)) | {"log_decay_BTHK": log_decay, "chunk_size": given}
    state = jax.ShapeDtypeStruct((1, 2, K, K), jnp.float32)
    with _traced_for_a_gpu(), gpu_launch.recorded():
        reason = unsupported_reason(**call, initial_state_BHKV=state)
        assert reason is None if message is None else message in reason
        assert chunk == form_of(*qkv, log_decay, given).C


COMPILED = """
import jax
from kernels_pallas import delta_rule
from kernels_pallas.gpu import launch as gpu_launch
from kernels_pallas.tools import triton_compile
from tests.kernels_pallas.gpu import test_triton
def run(*arrays):
    outputs, vjp = jax.vjp(lambda *x: delta_rule(*x, implementation="triton"), *arrays)
    return vjp(outputs)
shapes = test_triton._delta_rule_shapes({K}, "{dtype}", "{decay}")
with test_triton._traced_for_a_gpu():
    launches = triton_compile.launches(run, *shapes)
for launch in launches:
    if launch.kernel.__name__ in ("writes", "gradients_of_writes"):
        for capability in (80, 90):
            figures = triton_compile.compile_launch(launch, capability)
            assert figures.shared <= gpu_launch.SHARED[8.0], figures
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "K, dtype, decay",
    [
        (128, "float32", "per_channel"),
        *(
            pytest.param(*x, marks=pytest.mark.exhaustive)
            for x in (
                *((256, "float32", "per_channel"), (256, "float32", "none")),
                *((256, "bfloat16", "per_channel"), (256, "bfloat16", "none")),
            )
        ),
    ],
)
def test_the_chosen_chunk_compiles_within_shared_memory(K, dtype, decay):
    """Compiles in a process of its own: interpreting and compiling exclude each other."""
    code = COMPILED.format(K=K, dtype=dtype, decay=decay)
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_cpu_does_not_choose_it():
    with pytest.raises(NotImplementedError, match="it is a kernel for gpu; this is cpu"):
        linear_attention(*_qkv(), implementation="triton")


def test_missing_triton_names_the_extra(monkeypatch):
    monkeypatch.setattr(gpu_launch.importlib.util, "find_spec", lambda name: None)
    with (
        devices.interpreted(),
        pytest.raises(NotImplementedError, match=r"pip install -e '.\[triton\]'"),
    ):
        linear_attention(*_qkv(), implementation="triton")


def test_tiles_from_general_to_special(monkeypatch):
    table = {
        "op/triton/part/float32": {"BV": 32},
        "op/triton/part/float32/128x32": {"num_warps": 8},
    }
    monkeypatch.setattr(tuning, "_table", lambda: table)
    assert gpu_launch.tiles("op", "part", "float32", 100, 20) == {
        "BK": 64,
        "BV": 32,
        "num_warps": 8,
        "num_stages": 2,
    }
    assert gpu_launch.tiles("op", "part", "bfloat16", 20, 8)["BV"] == 16
    assert gpu_launch.TILES["BV"] == 64


def test_shared_key_heads_are_not_copied():
    """No launch of the forward pass reads q or k repeated for every value head."""
    B, T, G, H, K, V = 1, 128, 1, 6, 40, 24
    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, T, G, K), (B, T, G, K), (B, T, H, V))
    ]
    with devices.interpreted(), gpu_launch.recorded() as launches:
        jax.eval_shape(lambda *x: linear_attention(*x, implementation="triton"), *shapes)
    sizes = {int(np.prod(x.shape)) for launch in launches for x in launch.inputs}
    assert B * T * G * K in sizes and B * T * H * K not in sizes


@pytest.mark.parametrize("operator", [linear_attention, delta_rule, diagonal_scan])
def test_64_bit_types_change_no_launch(operator):
    """Kernels take 32-bit inputs, outputs and constants whatever `jax_enable_x64` says."""
    x, gate = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 40, 2, 16), (1, 40, 2)))
    arrays = {linear_attention: (x, x, x, gate), delta_rule: (x, x, x, gate, gate)}
    arrays = arrays.get(operator, (gate, gate))

    def gradients(*arrays):
        outputs, vjp = jax.vjp(lambda *x: operator(*x, implementation="triton"), *arrays)
        return vjp(outputs)

    def launches():
        with devices.interpreted(), gpu_launch.recorded() as found:
            jax.eval_shape(lambda *x: gradients(*x), *arrays)
        return found

    narrow = launches()
    with jax.enable_x64(True):
        assert launches() == narrow
    assert len(narrow) > 3


@pytest.mark.slow
def test_compiles_for_every_target(tmp_path):
    """Compiles in a process of its own: interpreting and compiling exclude each other."""
    command = [
        sys.executable,
        "-m",
        "experiments.bench",
        "gpu_report",
        "--shape=small",
        f"--out={tmp_path}",
    ]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=1200)
    rows = json.loads((tmp_path / "triton.json").read_text())["rows"]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert {row["op"] for row in rows} == set(static_triton.OPS)
    for row in rows:
        assert 0 < row["registers"] <= 255 and row["shared"] <= row["limit"], row


def test_the_stored_report_fits_every_target():
    rows = json.loads((static_triton.FOLDER / "triton.json").read_text())["rows"]
    assert rows == sorted(rows, key=static_triton.key)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert all(row["shared"] <= row["limit"] for row in rows)


def test_under_shard_map_as_it_comes():
    """With check_vma, split rows and a replicated decay, gradients are those of one device."""
    q = np.random.default_rng(0).standard_normal((2, 16, 1, 16)).astype(np.float32)
    rows, same = jax.sharding.PartitionSpec("part"), jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((2,), ("part",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def call(q, log_decay):
        return linear_attention(q, q, q, log_decay, implementation="triton")[0]

    def gradients(function):
        loss = jax.grad(lambda *z: jnp.sum(jnp.sin(function(*z))), (0, 1))
        return dict(zip("qg", jax.jit(loss)(q, -np.ones(1, np.float32))))

    with devices.interpreted():
        split = jax.shard_map(call, mesh=mesh, in_specs=(rows, same), out_specs=rows)
        assert_close(gradients(split), gradients(call), TOLERANCE["float32"])
