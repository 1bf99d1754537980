"""cpu_peers: peers are checked before they are timed, missing ones are named, files keep the other
peers' figures."""

import dataclasses
import importlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from experiments.benchmarks import cpu_peers, entries, operators, peak_memory, sweep

TINY = cpu_peers.Settings(
    shape=operators.Shape(B=1, H=1, K=4, V=4), length=8, memory_length=16, rounds=3, seconds=0.0
)
ABSENT = "a_library_that_is_not_there"


@pytest.fixture
def peers(monkeypatch):
    """Three peers of scalar decay: right, wrong and absent. Everybody has their module."""
    definition = operators.CASES["linear_attention"].function("reference", "per_token", TINY.shape)

    def right(x):
        return tuple(definition(x).values())

    def wrong(x):
        output, final_state = right(x)
        return output * 1.01, final_state

    base = next(c for c in cpu_peers.COMPARISONS if c.name == "Mamba-2 SSD")
    made = (
        dataclasses.replace(base, package="math", call=right),
        dataclasses.replace(base, package="cmath", call=wrong),
        dataclasses.replace(base, package=ABSENT, call=right),
    )
    monkeypatch.setattr(cpu_peers, "COMPARISONS", made)
    monkeypatch.setattr(cpu_peers, "INSTALL", dict.fromkeys(("math", "cmath", ABSENT), "get it"))
    monkeypatch.setattr(
        cpu_peers, "peer_entry", lambda c: cpu_peers.jax_peer_entry(c, cpu_peers.INSTALL[c.package])
    )


def test_only_what_is_right_is_timed(peers):
    rows = cpu_peers.compare("Mamba-2 SSD", TINY, log=lambda text: None)
    assert [(row["peer"], row["pass"]) for row in rows] == [
        (peer, which) for peer in ("math", "cmath", ABSENT) for which in sweep.PASSES
    ]
    right, wrong, absent = rows[1::2]
    assert right["ratio"] == right["ours"]["seconds"] / right["theirs"]["seconds"] > 0
    assert wrong["theirs"] is None and absent["theirs"] is None
    assert wrong["verdicts"]["cmath"].startswith("WRONG, so not timed: ")
    assert absent["verdicts"][ABSENT] == f"not supported: {ABSENT} is not installed: get it"
    assert {row["ours"]["seconds"] for row in rows[::2]} == {rows[0]["ours"]["seconds"]}


def _row(peer, ours, theirs, which="forward_backward"):
    figures = [
        seconds and {"seconds": seconds, "seconds_lower": seconds, "seconds_upper": seconds}
        for seconds in (ours, theirs)
    ]
    return {
        "comparison": "GLA",
        "peer": peer,
        "sizes": {"B": 1, "T": 8},
        "dtype": "float32",
        "pass": which,
        "ours": figures[0],
        "theirs": figures[1],
        "ratio": ours / theirs if theirs else None,
        "limit": 0.6 if which == "forward_backward" else None,
        "verdicts": {"chunked": "right", peer: "right" if theirs else "not supported"},
    }


def test_targets_are_judged_forward_and_backward():
    rows = [_row("jla", 0.6, 1.0), _row("jla", 0.7, 1.0), _row("jla", 0.7, None)]
    rows.append(_row("jla", 2.0, 1.0, "forward"))
    assert [target.met for target in cpu_peers.targets(rows)] == [True, False, None]


def test_each_peer_keeps_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cpu_peers, "_DISTRIBUTIONS", {"transformers": ("numpy",), "jla": ("numpy",)}
    )
    memory = {"comparison": "GLA", "peer": "jla", "implementation": "chunked", "T": 16}
    memory |= {"peak_bytes": 3 << 20, "planned_bytes": 2 << 20, "note": None}
    theirs = memory | {"implementation": "jla"}
    cpu_peers.save(tmp_path, {"timing": [_row("jla", 0.25, 1.0)], "memory": [memory, theirs]})
    first = (tmp_path / "jla.json").read_text()
    missing = theirs | {"peak_bytes": None, "planned_bytes": None, "note": "not installed"}
    timing = [_row("transformers", 0.5, 1.0), _row("jla", 0.9, None)]
    cpu_peers.save(tmp_path, {"timing": timing, "memory": [memory, missing]})
    assert (tmp_path / "jla.json").read_text() == first
    saved = json.loads((tmp_path / "transformers.json").read_text())["timing"]
    assert saved["environment"]["versions"]["numpy"] == np.__version__
    assert [row["ratio"] for row in saved["rows"]] == [0.5]
    table = (tmp_path / "tables.md").read_text()
    assert "at most 0.6x of jla: 0.25" in table and "of transformers: 0.50" in table
    assert "| 3.00 | 2.00 |" in table.replace("  ", " ")


@pytest.mark.parametrize("comparison", cpu_peers.COMPARISONS, ids=lambda c: f"{c.name}-{c.package}")
def test_peers_that_are_here_agree(comparison):
    case = operators.CASES[comparison.op]
    problem = operators.make_problem(case, TINY.shape, 8, comparison.variant, "float32")
    try:
        found = cpu_peers.peer_entry(comparison).prepare(problem, False).run()
    except NotImplementedError as reason:
        assert "pip install" in str(reason)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(comparison.package)
        return
    expected = case.function("reference", comparison.variant, TINY.shape)(problem.inputs)
    for name, x in found.items():
        np.testing.assert_allclose(x, expected[name], atol=2e-5)


def _hold(megabytes):
    """A call that holds so much for a moment, and keeps a byte."""
    return entries.Prepared(lambda: np.ones(megabytes << 20, np.uint8)[:1].copy(), temp_bytes=5)


def test_what_is_compared_goes_to_another_process():
    for comparison in cpu_peers.COMPARISONS:
        there = pickle.loads(pickle.dumps(comparison))
        assert (there.name, there.package, there.limit) == (
            comparison.name,
            comparison.package,
            comparison.limit,
        )


@pytest.mark.slow
def test_peak_memory_sees_what_a_call_held():
    found = peak_memory.measure(_hold, 64)
    assert 62 << 20 < found["peak_bytes"] < 80 << 20  # RSS is counted in batches of pages
    assert found["planned_bytes"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--only=x", "--only: unknown 'x'; choose from Gated DeltaNet, KDA"),
        ("--parts=x", "--parts: unknown 'x'; choose from timing, memory"),
    ],
)
def test_mistakes_are_explained(flag, message):
    command = [sys.executable, "-m", "experiments.bench", "cpu_peers", flag]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {message}")
