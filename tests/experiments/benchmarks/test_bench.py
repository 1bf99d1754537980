"""The benchmark: every operator runs, what is wrong is not timed, tables line up, mistakes are
explained."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver

from experiments.benchmarks import (
    compile_time,
    correctness,
    generation,
    lengths,
    machine,
    operators,
    pictures,
    report,
    sweep,
    timing,
)
from experiments.benchmarks.commands import operators as bench
from experiments.benchmarks.entries import jax_entry

TINY = sweep.Settings(
    shape=operators.Shape(H=2, K=4, V=4, window=4),
    lengths=(16,),
    rounds=1,
    seconds=10.0,
    check_length=20,
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "diagonal_scan" else pytest.mark.slow)
        for name in operators.CASES
    ],
)
def test_every_operator_is_checked_and_timed(name, tmp_path):
    case = operators.CASES[name]
    settings = dataclasses.replace(TINY, passes=("forward_backward",))
    section = sweep.section(case, case.variants[:1], settings, tmp_path, "a title")
    assert not section.wrong
    verdicts = {check["implementation"]: sweep.verdict(check) for check in section.checks}
    assert verdicts.keys() == set(case.implementations)
    timed = {row["implementation"]: row for row in section.rows}
    assert timed.keys() == {n for n, verdict in verdicts.items() if verdict.startswith("right")}
    assert len(timed) >= 2
    for row in timed.values():
        assert row["rounds"] >= timing.MIN_ROUNDS
        assert row["seconds_lower"] <= row["seconds"] <= row["seconds_upper"]
        assert row["token_us"] == pytest.approx(1e6 * row["seconds"] / 16)
        assert row["temp_bytes"] > 0
        assert row["compile_seconds"] > 0
    assert timed["reference"]["speedup"] == 1.0
    assert (tmp_path / f"{name}.png").stat().st_size > 1000


def _conv(change):
    """An entry that computes causal_conv, changed by `change` on its outputs."""
    case = operators.CASES["causal_conv"]
    right = case.function("reference", "short", TINY.shape)
    return jax_entry("peer", lambda inputs: change(right(inputs)))


@jax.custom_jvp
def _bends_gradients(x):
    return x


_bends_gradients.defjvps(lambda tangent, out, x: 1.01 * tangent)


def _on_output(function):
    return lambda outputs: outputs | {"output": function(outputs["output"])}


BROKEN = {
    "one token": (_on_output(lambda y: y.at[:, 7].multiply(1.001)), "output"),
    "not finite": (_on_output(lambda y: y.at[0, 3, 1].set(jnp.nan)), "output"),
    "gradient alone": (_on_output(_bends_gradients), "gradient of"),
    "final state": (
        lambda outputs: outputs | {"final state": 0 * outputs["final state"]},
        "final state",
    ),
    "channels in reverse": (_on_output(lambda y: jnp.flip(y, axis=-1)), "output"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_wrong_implementation_is_reported_and_not_timed(how, tmp_path):
    change, what = BROKEN[how]
    settings = dataclasses.replace(TINY, implementations=(), passes=("forward",))
    case = operators.CASES["causal_conv"]
    section = sweep.section(case, ("short",), settings, tmp_path, "", peers=[_conv(change)])
    assert section.wrong
    assert what in section.checks[0]["wrong"]
    assert section.rows == []
    assert any("WRONG, so not timed" in note for note in section.notes)
    assert "nothing was timed" in report.text(section)


def test_a_right_peer_is_timed(tmp_path):
    settings = dataclasses.replace(TINY, implementations=(), passes=("forward",))
    case = operators.CASES["causal_conv"]
    section = sweep.section(case, ("short",), settings, tmp_path, "", peers=[_conv(lambda y: y)])
    assert [row["implementation"] for row in section.rows] == ["peer"]


def test_what_does_not_fit_into_memory_is_not_started(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda: 1000)
    case = operators.CASES["causal_conv"]
    settings = dataclasses.replace(TINY, implementations=("reference",), passes=("forward",))
    (row,), _ = sweep.run(case, "short", settings)
    assert row["note"].startswith("not run: needs")
    assert sweep.display(row)["median ms"] is None
    assert report.text_table([sweep.display(row)])


def test_position_error():
    truth = np.ones((1, 4, 2))
    off = truth.copy()
    off[0, 2, 0] = 1.5
    assert correctness.position_error(off, truth) == pytest.approx(0.5)
    heads = np.ones((1, 4, 2, 4))
    off = heads.copy()
    off[0, 2, 0, 0] = 1.5
    assert correctness.position_error(off, heads) == pytest.approx(0.25)
    assert correctness.position_error(truth[:, :3], truth) == np.inf
    assert correctness.position_error(truth * np.nan, truth) == np.inf
    assert correctness.position_error(0 * truth, 0 * truth) == 0
    assert correctness.wrong({"a": 1e-6, "b": np.inf}, 1e-5) == "b off by inf"
    assert correctness.wrong({"a": 1e-6}, 1e-5) is None


def test_timing_is_round_robin():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = timing.interleaved(calls, rounds=6, seconds=float("inf"), block_seconds=0.0)
    turns = ["".join(order[i : i + 3]) for i in range(len(order) - 18, len(order), 3)]
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"}
    assert len(set(turns)) > 1, "one call always follows the same other"
    assert len(order) <= 3 * (3 + 6)
    assert all(took.rounds == 6 for took in found.values())


def test_timing_keeps_together_what_belongs_together():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a1", "b1", "a2", "b2")}
    timing.interleaved(
        calls,
        rounds=16,
        seconds=float("inf"),
        block_seconds=0.0,
        together=lambda key: key[0],
    )
    turns = ["".join(order[i : i + 4]) for i in range(len(order) - 64, len(order), 4)]
    either = [first + second for first in ("a1a2", "a2a1") for second in ("b1b2", "b2b1")]
    assert set(turns) <= {*either, *(x[4:] + x[:4] for x in either)}
    assert len(set(turns)) > 2, "the groups, or their calls, always come in one order"


def test_timing_stops_what_has_used_its_share(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def lasting(seconds):
        def call():
            clock[0] += seconds

        return call

    calls = {"very slow": lasting(9.0), "slow": lasting(1.5), "fast": lasting(0.1)}
    found = timing.interleaved(calls, rounds=8, seconds=2.0)
    assert {name: took.rounds for name, took in found.items()} == {
        "very slow": 1,
        "slow": 3,
        "fast": 8,
    }
    assert found["slow"].median == pytest.approx(1.5)
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0, 5)


def test_tables():
    rows = [
        {"name": "a", "T": 16, "ms": 0.01234, "x": None},
        {"name": "long", "T": 16384, "ms": 1234.5, "x": 2.0},
    ]
    assert report.text_table(rows).splitlines() == [
        "name      T      ms     x",
        "a        16  0.0123     -",
        "long  16384    1234  2.00",
    ]
    assert report.markdown_table(rows).splitlines() == [
        "| name | T | ms | x |",
        "| --- | ---: | ---: | ---: |",
        "| a | 16 | 0.0123 | - |",
        "| long | 16384 | 1234 | 2.00 |",
    ]


def _row(T, implementation, **figures):
    return {
        "T": T,
        "variant": "none",
        "pass": "forward",
        "implementation": implementation,
        **figures,
    }


def test_targets():
    rows = [
        _row(1024, "chunked", seconds=1, token_us=1.0, speedup=3.0),
        _row(2048, "chunked", seconds=2, token_us=1.0, speedup=4.5),
        _row(16384, "chunked", seconds=3, token_us=1.2, speedup=5.0),
        _row(16384, "reference"),
    ]
    faster, flat = sweep.targets("delta_rule", rows)
    assert (faster.met, flat.met) == (True, False)
    assert "4.50 (none, forward)" in faster.found and "1.20 (none, forward)" in flat.found
    assert [t.met for t in sweep.targets("delta_rule", rows[:1])] == [None, None]
    assert sweep.targets("softmax_attention", rows) == []
    lines = report.targets_text([faster, flat]).splitlines()
    assert lines[0].strip().startswith("met") and lines[1].strip().startswith("NOT MET")


def test_generation_measures_both_models(tmp_path):
    settings = generation.Settings(
        contexts=(8, 16), d_model=8, num_layers=1, heads=2, head_dim=4, piece=1, tokens=2, rounds=1
    )
    section = generation.section(settings, tmp_path, "a title")
    state = {(row["model"], row["context"]): row["state_bytes"] for row in section.rows}
    assert state["gated_delta_net", 8] == state["gated_delta_net", 16]
    assert state["attention", 16] > state["attention", 8]
    assert len(section.targets) == 1 and section.targets[0].met is not None
    assert (tmp_path / "generation.png").stat().st_size > 1000


def test_compile_time_of_a_tiny_model():
    config = compile_time.step_config(1, compile_time.Settings(length=16))
    assert config.model.num_layers == 1
    config.model.update(
        {
            "pattern": "attention(num_heads=2)",
            "d_model": 16,
            "vocab_size": 32,
            "channel_mixer": None,
        }
    )
    row = compile_time.compile_step(config)
    assert row["total"] >= row["compile"] > 0 and row["parameters"] > 0
    rows = [{"layers": 24, "ratio": 1.6}, {"layers": 4, "ratio": 1.0}]
    assert compile_time.targets(rows)[0].met is False
    rows = [{"layers": 24, "ratio": 0.9}, {"layers": 4, "ratio": 1.0}]
    assert compile_time.targets(rows)[0].met is True


def _main(**values):
    with flagsaver.flagsaver(**values):
        if not bench.flags.FLAGS.is_parsed():
            bench.flags.FLAGS.mark_as_parsed()
        return bench.main(["bench"])


@pytest.mark.slow
def test_the_program_writes_its_results(tmp_path, capsys):
    code = _main(
        op=["causal_conv"],
        lengths=["16"],
        implementations=["shifted", "reference"],
        passes=["forward"],
        heads=2,
        value_dim=4,
        rounds=1,
        seconds=0.0,
        out=str(tmp_path),
    )
    assert code == 0
    assert "us per token" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"cpu", "cores", "device", "date", "python", "versions"} <= result["environment"].keys()
    (section,) = result["sections"]
    assert section["settings"]["D"] == 8
    assert {row["implementation"] for row in section["rows"]} == {"shifted", "reference"}
    tables = (tmp_path / "tables.md").read_text()
    assert "| variant |" in tables and "![causal_conv](causal_conv.png)" in tables


@pytest.mark.parametrize("case", operators.CASES.values(), ids=lambda case: case.name)
def test_every_variant_is_a_problem(case):
    """In the dtype asked for, where that is the operator's to choose."""
    for variant in case.variants:
        problem = operators.make_problem(case, TINY.shape, 8, variant, "bfloat16")
        assert problem.cotangents["output"].shape[:2] == (1, 8)
        dtypes = {name: str(x.dtype) for name, x in problem.inputs.items()}
        if variant != "complex":
            assert {dtypes[name] for name in case.rounded} == {"bfloat16"}
        assert dtypes.get("log_decay", "float32") == "float32"
    assert case.sizes(TINY.shape)["B"] == 1


def test_a_wrong_answer_is_the_exit_code(monkeypatch, tmp_path):
    section = report.Section("x", {}, [], [], [], wrong=True)
    monkeypatch.setattr(bench, "_measurement", lambda op: lambda folder, title: section)
    assert _main(op=["causal_conv"], out=str(tmp_path)) == 1


@pytest.mark.parametrize("case", operators.CASES.values(), ids=lambda case: case.name)
def test_published_shapes_are_problems(case):
    assert case.shapes
    for name in case.shapes:
        shape, length, variant = operators.published(case, name)
        assert variant in case.variants
        assert length >= 1
        assert all(isinstance(size, int) for size in case.sizes(shape).values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"op": ["gated"]}, "choose from linear_attention, delta_rule"),
        ({"op": ["all", "gated"]}, "choose from linear_attention, delta_rule"),
        (
            {"op": ["all", "delta_rule"], "decay": ["scalar"]},
            "none, per_head, per_token, per_channel",
        ),
        ({"op": ["delta_rule"], "lengths": ["1k"]}, "--lengths is 1k; give numbers"),
        ({"op": ["delta_rule"], "lengths": ["0"]}, "--lengths has 0; it must be at least 1"),
        (
            {"op": ["causal_conv"], "implementations": ["cudnnn"]},
            "choose from pallas_tpu, shifted, reference",
        ),
        ({"op": ["causal_conv"], "implementations": ["chunked"]}, "has none of chunked"),
        ({"op": ["delta_rule"], "decay": ["scalar"]}, "none, per_head, per_token, per_channel"),
        ({"op": ["delta_rule"], "passes": ["backward"]}, "forward, forward_backward"),
        ({"op": ["causal_conv"], "shape": "big"}, "no shape 'big'; choose one of mamba2_2.7b"),
    ],
)
def test_mistakes_list_the_choices(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        _main(out=str(tmp_path / "none"), **values)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_bad_flag_ends_with_exit_code_2():
    command = [sys.executable, "-m", "experiments.bench", "--op=causal_conv", "--dtype=float8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "float32|bfloat16" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_lengths(tmp_path):
    """Linear and softmax attention in one run: right, timed, drawn, and a state that stays."""
    settings = lengths.Settings(
        shape=operators.Shape(B=1, H=2, K=4, V=4),
        lengths=(16, 32),
        rounds=3,
        check_length=20,
        blocks=3,
        block_size=8,
    )
    rows, checks = lengths.rows(settings)
    assert not any(check["wrong"] for check in checks)
    timed = [row for row in rows if "seconds" in row]
    assert len(timed) == 2 * 2 * 2 and all(row["seconds"] > 0 for row in timed)
    planned = [row["temp_bytes"] for row in rows if row["operator"] == lengths.DENSE]
    assert len(planned) == 2 and planned[1] > planned[0]
    stream, error = lengths.stream(settings)
    assert error < 1e-6
    assert [row["state_bytes"] for row in stream] == [4 * 2 * 4 * 4] * 3
    assert [row["keys_and_values_bytes"] for row in stream] == [512, 1024, 1536]
    table = lengths.table(rows)
    assert [line["T"] for line in table] == [16, 32] and len(table[0]) == 10
    assert len(lengths.growth(rows)) == 4
    pictures.lengths(rows, stream, tmp_path / "lengths.png", "a title")
    assert (tmp_path / "lengths.png").stat().st_size > 10_000
