"""tpu_report: a run ends in JSON and a table, the same twice; mistakes are explained."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.benchmarks import operators, static_cost


@pytest.mark.slow
def test_rows_and_files(tmp_path):
    rows = list(static_cost.rows("diagonal_scan", "small", "v6e", "bfloat16"))
    assert [(r["implementation"], r["pass"]) for r in rows] == [
        (name, p) for name in ("pallas_tpu", "chunked") for p in static_cost.PASSES
    ]
    forward, both, *chunked = rows
    assert 0 < forward["kernel_cycles"] < both["kernel_cycles"]
    assert [k["name"] for k in both["kernels"]] == [
        "diagonal_scan_backward",
        "diagonal_scan_forward",
    ]
    assert forward["hbm_ratio"] < 1.3
    assert all(row["xla_cycles"] > 0 and row["kernel_cycles"] == 0 for row in chunked)
    static_cost.save(tmp_path, rows)
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files.keys() == {"diagonal_scan_v6e.json", "tables.md"}
    assert "Compiled figures, not runs" in files["tables.md"]
    static_cost.save(tmp_path, rows[::-1])  # in place of the old rows, in the same order
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_targets_are_judged_at_their_shape():
    row = {
        "op": "delta_rule", "decay": "per_token", "shape": "target", "dtype": "bfloat16", "topology": "v6e:2x2",
        "implementation": "pallas_tpu", "pass": "forward", "kernel_cycles": 14.0, "xla_cycles": 1.0, "unestimated_bytes": 0,
        "hbm_ratio": 1.4, "kernels": [{"name": "k", "spills": 3, "spill_share": 0.02}],
    }  # fmt: skip
    assert [target.met for target in static_cost.targets([row])] == [True, False, False]
    assert [t.met for t in static_cost.targets([row | {"error": "no VMEM"}])] == [False]
    assert static_cost.targets([row | {"shape": "small"}]) == []


@pytest.mark.parametrize(
    "op, variant", [("delta_rule", "per_channel"), ("diagonal_scan", "complex")]
)
def test_models_arrays_give_the_operators_results(op, variant):
    case, shape = operators.CASES[op], operators.Shape(H=2, K=4, V=6, D=5)
    inputs = operators.make_problem(case, shape, 5, variant, "float32").inputs
    call = case.function("reference", variant, shape)
    flat_call, arguments = static_cost.as_models_call(call, inputs)
    leaves = jax.tree.leaves(arguments)
    assert all(x.dtype != np.complex64 for x in leaves)
    flat = {
        name: (x.real, x.imag) if isinstance(arguments[name], tuple) else x.reshape(arguments[name].shape)
        for name, x in inputs.items()
    }  # fmt: skip
    for name, expected in jax.jit(call)(inputs).items():
        got = jax.jit(flat_call)(flat)[name]
        if isinstance(got, tuple):
            got = got[0] + 1j * got[1]
        elif name == "output":
            assert got.shape == (1, 5, 2 * 6)
        np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", static_cost.OPS)
def test_abstract_inputs_are_those_of_the_problem(op):
    case = operators.CASES[op]
    shape, _, variants = static_cost.workload(case, "target")
    for variant in variants:
        problem = operators.make_problem(case, shape, 5, variant, "bfloat16")
        expected = {name: (x.shape, x.dtype) for name, x in problem.inputs.items()}
        got = static_cost.abstract_inputs(case, shape, 5, variant, "bfloat16")
        assert {name: (x.shape, x.dtype) for name, x in got.items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--op=x", "--op: unknown 'x'; choose from linear_attention, delta_rule, diagonal_scan"),
        ("--topology=v9", "unknown TPU topology 'v9'; give one of v5e, v5p, v6e, tpu7x"),
        ("--shape=x", "--shape: unknown 'x'; choose all, or of linear_attention: target"),
    ],
)
def test_mistakes_end_with_code_2(flag, message):
    command = [sys.executable, "-m", "experiments.bench", "tpu_report", flag]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert message in process.stderr and "Traceback" not in process.stderr
