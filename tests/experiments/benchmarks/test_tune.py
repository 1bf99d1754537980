"""bench tune: sizes by cost, never by less than the noise; the table it writes; mistakes are
explained."""

import json

import pytest
from absl.testing import flagsaver

from experiments.benchmarks import tune
from experiments.benchmarks.commands import operators as bench
from kernels_pallas.ops.linear_attention import shapes as linear_attention_shapes


def _main(main=bench.tune_main, **values):
    with flagsaver.flagsaver(**values):
        if not bench.flags.FLAGS.is_parsed():
            bench.flags.FLAGS.mark_as_parsed()
        return main(["bench"])


def _fake_measure(costs):
    """Costs by one key's sizes; what is not in the list does not run."""
    seen = []

    def measure(trials):
        seen.extend(trials)
        return [costs(next(iter(trial.values()))) for trial in trials]

    return seen, measure


def test_tuning_takes_one_size_after_another(monkeypatch):
    job = tune.Job("linear_attention", "target", "none", "bfloat16", "pallas_tpu", "v6e")
    cycles = {64: 9.0, 128: 5.0, 256: None}  # 256 does not fit
    seen, measure = _fake_measure(
        lambda sizes: (
            cycles[sizes["chunk_size"]] and cycles[sizes["chunk_size"]] - (sizes["heads"] > 2)
        )
    )
    found = tune._descend(job, "key", {"chunk_size": 64, "heads": 2}, {}, measure)
    assert found.sizes == {"chunk_size": 128, "heads": 4}  # 8 comes to the same
    assert ({"chunk_size": 256, "heads": 2}, None) in found.costs
    assert [line[""] for line in tune.lines(found)].count("taken") == 1
    _, measure = _fake_measure(lambda sizes: 5.0 - 0.01 * sizes["heads"])  # not worth it
    found = tune._descend(job, "key", {"chunk_size": 64, "heads": 2}, {}, measure)
    assert found.sizes == {"chunk_size": 64, "heads": 2}
    _, measure = _fake_measure(lambda sizes: {2: 18.0, 4: 17.0, 8: 16.8}[sizes["heads"]])
    found = tune._descend(job, "key", {"chunk_size": 64, "heads": 2}, {}, measure)
    assert found.sizes == {"chunk_size": 64, "heads": 4}  # near the best, and smaller
    _, measure = _fake_measure(lambda sizes: None)
    with pytest.raises(ValueError, match="the sizes in use do not run"):
        tune._descend(job, "key", {"chunk_size": 64, "heads": 2}, {}, measure)


def test_accuracy_is_not_traded_for_speed():
    job = tune.Job("delta_rule", "target", "none", "float32", "pallas_tpu", "v6e")
    seen, measure = _fake_measure(lambda sizes: 1.0 / sizes["chunk_size"])
    found = tune._descend(job, "key", {"chunk_size": 32, "heads": 2}, {}, measure)
    assert found.sizes["chunk_size"] == 32
    assert {trial["key"]["chunk_size"] for trial in seen} == {32}


def test_tuning_here_times_the_chunked_form_and_writes_the_table(tmp_path, capsys, monkeypatch):
    tiny = {"small": {"B": 1, "T": 64, "G": 1, "H": 1, "K": 4, "V": 4, "decay": "none"}}
    monkeypatch.setattr(linear_attention_shapes, "SHAPES", tiny)
    monkeypatch.setitem(tune.CANDIDATES, "chunked", {"chunk_size": (16, 64)})
    _main(
        op=["linear_attention"],
        shape="small",
        dtype="float32",
        rounds=1,
        seconds=0.0,
        out=str(tmp_path),
    )
    table = json.loads((tmp_path / "tuned.json").read_text())
    (key,) = table
    assert key == "linear_attention/chunked/float32/4x4 none/cpu"
    assert table[key]["chunk_size"] in (16, 64)
    (row,) = json.loads((tmp_path / "reports" / "tuning.json").read_text())
    assert row["key"] == key and row["unit"] == "seconds"
    assert {tried["chunk_size"] for tried in row["tried"]} == {16, 64}
    assert all(tried["cost"] > 0 for tried in row["tried"])
    assert "taken" in capsys.readouterr().out


@pytest.mark.slow
def test_tuning_a_topology(tmp_path, monkeypatch):
    monkeypatch.setitem(tune.CANDIDATES, "pallas_tpu", {"chunk_size": (64, 128), "heads": (2,)})
    _main(op=["linear_attention"], topology=["v6e"], shape="small", out=str(tmp_path))
    table = json.loads((tmp_path / "tuned.json").read_text())
    (key,) = table
    assert key == "linear_attention/pallas_tpu/bfloat16/64x64 per_token/TPU v6 lite"
    (row,) = json.loads((tmp_path / "reports" / "tuning.json").read_text())
    cost = {(x["chunk_size"], x["heads"]): x["cost"] for x in row["tried"]}
    assert len(cost) >= 3 and all(c > 0 for c in cost.values())
    taken = cost[table[key]["chunk_size"], table[key]["heads"]]
    assert 0.98 * taken <= min(cost.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"op": ["causal_conv"]}, "choose from linear_attention, delta_rule, diagonal_scan"),
        ({"op": ["delta_rule"], "shape": "big"}, "unknown 'big'; choose of delta_rule: target"),
        ({"topology": ["v9"]}, "unknown TPU topology 'v9'; give one of v5e"),
        ({"implementations": ["pallas_tpu"]}, "unknown 'pallas_tpu'; choose from chunked"),
        ({"lengths": ["512"]}, "--lengths: tune takes all calls of --shape"),
        ({"decay": ["none"]}, "--decay: tune takes all calls of --shape"),
        ({"key_dim": 64}, "--key_dim: tune takes all calls of --shape"),
        ({"main": bench.main, "topology": ["v6e"]}, "only tune compiles for one"),
    ],
)
def test_mistakes_of_tuning(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        _main(**{"out": str(tmp_path / "none")} | values)
    assert not (tmp_path / "none").exists()
