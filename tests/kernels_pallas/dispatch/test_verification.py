"""A kernel that nobody named serves once it has passed its check; the checks themselves,
interpreted."""

import functools
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import dispatch, ops, selfcheck
from kernels_pallas.dispatch import case, devices, kernel_check, verification

RUNS = []  # the kernels that were traced, by name


def _implementation(name, platform, change=lambda y: y, gradient_change=lambda g: g):
    """A fake operator, y = 2 x, that changes its result or its gradient."""

    @jax.custom_vjp
    def double(x):
        return change(2 * x)

    double.defvjp(lambda x: (double(x), None), lambda _, g: (gradient_change(2 * g),))

    def call(x):
        RUNS.append(name)
        return double(x)

    return dispatch.Implementation(name, call, platform=platform)


def _raise(y):
    raise RuntimeError("Mosaic failed to compile\nand more lines")


KERNELS = {
    "right": {},
    "wrong": {"change": lambda y: y.at[0, 3].add(0.5)},
    "wrong gradient": {"gradient_change": lambda g: 1.1 * g},
    "nan": {"change": lambda y: y.at[0, 0].set(jnp.nan)},
    "raises": {"change": _raise},
}
LISTS = {
    name: (_implementation("kernel", "cpu", **changes), _implementation("chunked", None))
    for name, changes in KERNELS.items()
}
REPORTED = {
    "wrong": "output is off by",
    "wrong gradient": "the gradient of x is off by 0.",
    "nan": "output is off by inf",
    "raises": "RuntimeError: Mosaic failed to compile. The next",
}


CASE = case.OperatorCase(
    positional=("x",),
    inputs=lambda rng, shape, regime: {"x": rng.standard_normal((1, 5)).astype(np.float32)},
    kinds=("only",),
    kind_of=lambda x: ("only", str(x.dtype)),
    regimes=(),
    rounded=("x",),
    letters="",
)


def _operator(kind):
    """The fake operator with the kernel of that kind."""

    def fake(x, implementation=None, segment_ids=None):
        return dispatch.choose(_operator(kind), implementation, x=x).call(x)

    return dispatch.Operator(fake, LISTS[kind], CASE)


def _call(kind, x, implementation=None):
    return _operator(kind).function(x, implementation)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No records, neither in memory nor on disk; and no stale versions."""
    monkeypatch.setenv("SEQMODELS_CACHE", str(tmp_path / "cache"))
    _new_process(monkeypatch)
    RUNS.clear()


def _new_process(monkeypatch):
    monkeypatch.setattr(verification, "_decided", {})


@pytest.fixture
def kind(request, monkeypatch):
    """The program knows the fake operator with the kernel that the parameter names."""
    monkeypatch.setitem(selfcheck.OPERATORS, "fake", _operator(request.param))
    return request.param


def _served(kind, x=None):
    """Who serves a call, and what it returns; warnings are errors."""
    x = jnp.ones((1, 4)) if x is None else x
    before = len(RUNS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = _call(kind, x)
    return RUNS[before:][-1], y


def _each(*names):
    return pytest.mark.parametrize("kind", names, indirect=True)


@_each("right")
def test_a_kernel_that_passes_serves_and_is_checked_once(kind):
    assert _served(kind)[0] == "kernel"
    assert RUNS.count("chunked") > 0
    checked = len(RUNS)
    assert _served(kind)[0] == "kernel"
    assert len(RUNS) == checked + 1


@_each(*REPORTED)
def test_a_kernel_that_fails_does_not_serve_and_one_warning_says_why(kind):
    with pytest.warns(UserWarning) as found:
        y = _call(kind, jnp.ones((1, 4)))
    np.testing.assert_array_equal(y, 2 * np.ones((1, 4)))
    (warning,) = found
    text = str(warning.message)
    assert REPORTED[kind] in text and "fake: the kernel 'kernel' failed" in text
    assert "python -m kernels_pallas.selfcheck" in text
    assert _served(kind)[0] == "chunked"  # and no second warning


@_each("wrong", "raises")
def test_a_named_kernel_is_not_checked(kind):
    if kind == "raises":
        with pytest.raises(RuntimeError, match="Mosaic"):
            _call(kind, jnp.ones((1, 4)), "kernel")
    else:
        assert _call(kind, jnp.ones((1, 4)), "kernel")[0, 3] == 2.5
    assert RUNS == ["kernel"]


@_each("right", "wrong")
def test_inside_a_trace(kind, monkeypatch):
    """No tracer enters the check, and no mesh: under jit, grad, vmap, scan and shard_map it decides
    as outside."""
    expected = "kernel" if kind == "right" else "chunked"
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
    rows = jax.sharding.PartitionSpec("rows")
    x = jnp.ones((8, 4))

    def call(x):
        return _call(kind, x)

    under = {  # functions of their own, for traces are kept by function
        "jit": jax.jit(lambda x: call(x)),
        "grad": jax.grad(lambda x: call(x).sum()),
        "vmap": jax.vmap(lambda x: call(x[None])[0]),
        "checkpoint": jax.checkpoint(lambda x: call(x)),
        "scan": lambda x: jax.lax.scan(lambda c, _: (call(c), None), x, None, length=2)[0],
        "shard_map": jax.jit(
            jax.shard_map(lambda x: call(x), mesh=mesh, in_specs=rows, out_specs=rows)
        ),
        "eval_shape": lambda x: jax.eval_shape(lambda x: call(x), x),
    }
    for name, function in under.items():
        _new_process(monkeypatch)
        verification.cache_file().unlink(missing_ok=True)
        RUNS.clear()
        with warnings.catch_warnings(record=True) as found, jax.checking_leaks():
            warnings.simplefilter("always")
            function(x)
        assert RUNS[-1] == expected, name
        assert len(set(RUNS)) == 2, f"{name}: no check ran"
        assert len(found) == (kind == "wrong"), name
    _new_process(monkeypatch)
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.jit(lambda x: call(x))(x)
    assert RUNS[-1] == expected


@_each("right", "wrong")
def test_the_next_process_reads_the_record(kind, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _call(kind, jnp.ones((1, 4)))
    _new_process(monkeypatch)
    RUNS.clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _call(kind, jnp.ones((1, 4)))
    assert set(RUNS) == {"kernel" if kind == "right" else "chunked"}
    assert len(found) == (kind == "wrong")  # once a process


@_each("raises")
def test_an_exception_is_not_kept_for_the_next_process(kind, monkeypatch):
    for _ in range(2):
        _new_process(monkeypatch)
        with pytest.warns(UserWarning, match="Mosaic"):
            _call(kind, jnp.ones((1, 4)))
    assert not verification.cache_file().exists()


@_each("right")
@pytest.mark.parametrize(
    "change",
    [
        {"versions": lambda platform: {"jax": "99.0"}},
        {"_source": lambda operator: "another"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_version_is_checked_anew(kind, change, monkeypatch):
    _served(kind)
    for name, value in change.items():
        monkeypatch.setattr(verification, name, value)
    RUNS.clear()
    _served(kind)
    assert RUNS.count("chunked") > 0
    assert len(json.loads(verification.cache_file().read_text())) == 2


@_each("right")
def test_dtypes_are_checked_each(kind):
    _served(kind)
    RUNS.clear()
    assert _served(kind, jnp.ones((1, 4), jnp.bfloat16))[0] == "kernel"
    assert RUNS.count("chunked") > 0


@_each("right")
def test_a_check_holds_for_the_width_of_types_it_was_made_with(kind, monkeypatch):
    """Under 64-bit types anew, and with them on in the thread that checks; each is remembered."""
    seen = []
    check = kernel_check.check

    def watched(*call):
        seen.append(jax.config.jax_enable_x64)
        return check(*call)

    monkeypatch.setattr(kernel_check, "check", watched)
    for x64 in (False, True):
        with jax.enable_x64(x64):
            assert _served(kind, jnp.ones((1, 4), jnp.float32))[0] == "kernel"
            assert set(seen) == {x64}
            seen.clear()
            _served(kind, jnp.ones((1, 4), jnp.float32))
            assert not seen
    assert len(json.loads(verification.cache_file().read_text())) == 2


@_each("right")
@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"KEY": 3}', '{"KEY": {"problem": 3}}', b"\xff\xfe"], ids=repr
)
def test_a_bad_cache_file_is_checked_again_and_replaced(kind, content, monkeypatch):
    key = verification.record_key(devices.current(), "fake", "kernel", "only", "float32")
    path = verification.cache_file()
    path.parent.mkdir()
    if isinstance(content, str):
        content = content.replace("KEY", key).encode()
    path.write_bytes(content)
    assert _served(kind)[0] == "kernel"
    assert RUNS.count("chunked") > 0
    assert json.loads(path.read_text())[key]["problem"] is None
    assert [p.name for p in path.parent.iterdir()] == ["selfcheck.json"]


@_each("right")
def test_a_folder_that_cannot_be_written_is_no_error(kind, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEQMODELS_CACHE", str(tmp_path / "file"))
    assert _served(kind)[0] == "kernel"
    monkeypatch.setenv("SEQMODELS_CACHE", str(tmp_path))
    (tmp_path / "selfcheck.json").mkdir()  # os.replace fails, and leaves nothing behind
    _new_process(monkeypatch)
    assert _served(kind)[0] == "kernel"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "selfcheck.json"}


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/general")
    assert verification.cache_file() == tmp_path / "cache" / "selfcheck.json"
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv(
        "SEQMODELS_CACHE", "~/own"
    )  # as a container's settings have it, whom no shell has expanded
    assert str(verification.cache_file()) == "/home/me/own/selfcheck.json"
    monkeypatch.delenv("SEQMODELS_CACHE")
    assert str(verification.cache_file()) == "/general/seqmodels/selfcheck.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/general")
    assert str(verification.cache_file()) == "/home/me/general/seqmodels/selfcheck.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(verification.cache_file()) == "/home/me/.cache/seqmodels/selfcheck.json"
    monkeypatch.setenv("SEQMODELS_CACHE", "~/kept")
    assert str(verification.cache_file()) == "/home/me/kept/selfcheck.json"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # whose user has no home
    assert verification.cache_file().is_absolute()


@_each("wrong")
def test_an_abstract_target_is_served_unchecked(kind, monkeypatch):
    """A kernel for a part that is not here: nothing could run."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    kernel = _implementation("tpu kernel", "tpu")
    monkeypatch.setitem(LISTS, kind, (kernel, *LISTS[kind]))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        jax.eval_shape(lambda x: _call(kind, x), jnp.ones((1, 4)))
    assert RUNS == ["tpu kernel"]
    assert not verification.cache_file().exists()


def test_every_dtype_that_a_kernel_takes_is_checked():
    """One that is used and not checked would serve on the word of another's check."""
    checks = selfcheck.checks(selfcheck.OPERATORS["delta_rule"], ("gpu",))
    triton = [dtype for name, _, dtype in checks]
    assert set(triton) == {"float32", "bfloat16", "float16"} == set(kernel_check.BOUND)
    with devices.interpreted():
        x = jax.ShapeDtypeStruct((1, 4, 1, 16), jnp.float16)
        call = functools.partial(kernels_pallas.linear_attention, implementation="triton")
        jax.eval_shape(call, x, x, x)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["linear_attention", "delta_rule"])
def test_float16_passes_its_check_interpreted(operator):
    with devices.interpreted():
        operator = selfcheck.OPERATORS[operator]
        result = kernel_check.check(operator, "triton", "per_token", "float16", kernel_check.TINY)
    assert result.problem is None


def test_every_operator_with_a_kernel_has_checks():
    """Those of a public function that chooses a kernel anywhere."""
    for operator in _operators():
        if any(x.platform for x in operator.implementations):
            assert selfcheck.OPERATORS[operator.name] is operator
            assert selfcheck.checks(operator, ("tpu",))


def _operators():
    """Every `dispatch.Operator` of the operators' folders."""
    for module in pkgutil.walk_packages(ops.__path__, "kernels_pallas.ops."):
        if module.name.endswith(".api"):
            found = vars(importlib.import_module(module.name)).values()
            yield from (x for x in found if isinstance(x, dispatch.Operator))


def _kind(operator, *arguments, **keywords):
    return kernels_pallas.explain(operator, *arguments, **keywords).kind


@pytest.mark.parametrize(
    "kind, decay, ids",
    [
        ("none", None, False),
        ("per_token", None, True),
        ("per_token", 1, True),
        ("per_channel", 8, False),
    ],
)
def test_kinds_of_the_matrix_recurrences(kind, decay, ids):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x, gate = jnp.ones((1, 4, 2, 8), dtype), jnp.zeros((1, 4, 2, decay or 1))
        log_decay = None if decay is None else gate[..., 0] if decay == 1 else gate
        keywords = {"segment_ids": jnp.ones((1, 4), jnp.int32) if ids else None}
        for operator, inputs in (
            (kernels_pallas.linear_attention, (x, x, x)),
            (kernels_pallas.delta_rule, (x, x, x, gate[..., 0])),
            (kernels_pallas.diagonal_plus_low_rank, (x, x, x, x, x)),
        ):
            assert _kind(operator, *inputs, log_decay, **keywords) == f"{kind} {x.dtype}"


def test_other_kinds():
    x, ids = jnp.ones((1, 4, 2), jnp.bfloat16), jnp.ones((1, 4), jnp.int32)
    for decay, expected in ((0.5, "real bfloat16"), (0.5j, "complex float32")):
        assert _kind(kernels_pallas.diagonal_scan, x, jnp.full((2,), decay)) == expected
    conv_kinds = selfcheck.OPERATORS["causal_conv"].case.kinds
    for options, expected in (
        ({}, "sums"),
        ({"activation": "silu", "segment_ids": ids}, "silu packed"),
        ({"activation": "silu", "l2_norm_heads": 1, "segment_ids": ids}, "silu norm packed"),
    ):
        kind = _kind(kernels_pallas.causal_conv, x, jnp.ones((4, 2)), **options)
        assert kind == f"{expected} bfloat16" and expected in conv_kinds
    for dtypes, expected in (
        ((jnp.float16, jnp.float16), "float16"),
        ((jnp.float16, jnp.bfloat16), "float16"),  # neither path of its own: the finer check
        ((jnp.float16, jnp.float32), "float32"),
    ):
        assert case.checked_dtype(*(jnp.ones(1, dtype) for dtype in dtypes)) == expected
    q = x[..., None]
    for options, expected in (
        ({}, "causal"),
        ({"window": 2, "segment_ids": ids}, "causal window packed"),
        ({"causal": False}, "full"),
    ):
        kind = _kind(kernels_pallas.softmax_attention, q, q, q, **options)
        assert kind == f"{expected} bfloat16"


@pytest.mark.parametrize("operator", selfcheck.OPERATORS.values(), ids=lambda x: x.name)
def test_a_case_makes_calls_of_its_kinds(operator):
    """Of each kind the inputs and options that the check takes are a call of that kind, so that a
    record is kept under what was checked."""
    shape, case = kernel_check.TINY, operator.case
    for kind in case.kinds:
        inputs = case.inputs(np.random.default_rng(0), shape, f"{kind} check")
        ids = np.ones((shape.B, shape.T), np.int32) if case.packed(kind) else None
        with dispatch.recorded() as choices:
            jax.eval_shape(
                lambda x, case=case, kind=kind, ids=ids: case.call(
                    operator.function, x, segment_ids=ids, **case.options(kind, shape)
                ),
                inputs,
            )
        assert [choice.kind for choice in choices] == [f"{kind} float32"]


def _main(*arguments):
    command = [sys.executable, "-m", "kernels_pallas.selfcheck", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_platform_that_is_not_there_is_told_in_one_line(monkeypatch, capsys):
    def current():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(devices, "current", current)
    with pytest.raises(SystemExit, match="2"):
        selfcheck.main([])
    assert "error: Unable to initialize backend 'tpu'" in capsys.readouterr().err


def test_the_program_says_that_a_cpu_has_no_kernels():
    done = _main()
    assert done.returncode == 0 and done.stderr == ""
    assert f"jax {jax.__version__}" in done.stdout
    assert "no operator has a kernel for cpu; --interpret" in done.stdout


@_each("wrong", "raises", "right")
def test_the_programs_table_and_exit_code(kind, capsys):
    assert selfcheck.main(["--op=fake"]) == (kind != "right")
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("fake")]
    assert len(rows) == 2 and all(("ok" in row) == (kind == "right") for row in rows)
    assert REPORTED.get(kind, "ok")[:20] in rows[0]
    assert verification.cache_file().exists() == (kind != "raises")


@_each("right", "wrong")
def test_kernels_of_other_machines_are_interpreted(kind, monkeypatch, capsys):
    kernel = _implementation("kernel", "tpu", **KERNELS[kind])
    monkeypatch.setitem(LISTS, kind, (kernel, *LISTS[kind][1:]))
    monkeypatch.setitem(selfcheck.OPERATORS, "fake", _operator(kind))
    assert selfcheck.main(["--op=fake"]) == 0
    assert "no operator has a kernel for cpu" in capsys.readouterr().out
    assert selfcheck.main(["--op=fake", "--interpret"]) == (kind == "wrong")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fake")]
    assert len(rows) == 2 and all(("WRONG" in row) == (kind == "wrong") for row in rows)
    assert not verification.cache_file().exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "operator", ("linear_attention", "delta_rule", "diagonal_scan", "causal_conv")
)
def test_every_kernel_passes_interpreted(operator):
    done = _main("--interpret", f"--op={operator}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(operator)]
    assert len(rows) > 4 and "WRONG" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator, variant",
    [
        ("linear_attention", "per_token"),
        ("diagonal_scan", "real"),
        ("causal_conv", "silu norm packed"),
        pytest.param("delta_rule", "per_token", marks=pytest.mark.exhaustive),
    ],
)
def test_a_check_at_its_real_size(operator, variant):
    """More than one chunk, the last one not whole, as on a device."""
    with devices.interpreted():
        operator = selfcheck.OPERATORS[operator]
        result = kernel_check.check(operator, "pallas_tpu", variant, "bfloat16")
    assert result.problem is None and result.gradient > 1e-6  # not compared with itself
