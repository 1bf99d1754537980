"""The frame of the claims: runs are found again, verdicts shown, and kept results up to date."""

import json
import os
import signal

import jax
import pytest

from experiments import claims
from experiments.claims import claim, gallery, kept, runner
from experiments.claims.context import Context, changed
from experiments.launch import cli
from experiments.training import loop
from tests.experiments import tiny

# Claims whose kept verdict is measured again: the cheapest, and, among the exhaustive tests, those
# that tests of linearization rest on.
WHOLE = [
    "context_parallelism",
    *(
        pytest.param(name, marks=pytest.mark.exhaustive)
        for name in ("liger", "lolcats", "hedgehog", "softmax_layers_kept")
    ),
]


def a_claim(**fields):
    """Returns a claim that measures nothing but its seeds."""

    def draw(measured, figure):
        figure.subplots().plot(measured["value"], label="value | all seeds")

    given = {
        "title": "Ones are less than twos",
        "paper": "arXiv 1234.56789",
        "section": "table 1",
        "published": "1 and 2",
        "ours": "counting",
        "run": lambda context: {"value": [1.0 for _ in context.seeds]},
        "judge": lambda measured: [claim.less("1 | 2", measured["value"], [2.0, 2.0])],
        "draw": draw,
        "seeds": 2,
    }
    return claim.Claim(**given | fields)


@pytest.fixture
def claimed(monkeypatch, tmp_path):
    """Returns a function that makes the given claims the only ones, and runs them.

    It returns the names of those that could not be measured.
    """

    def run(made, only=()):
        monkeypatch.setattr(claims, "names", lambda: list(made))
        monkeypatch.setattr(claims, "load", made.__getitem__)
        return runner.run(runner.chosen(only), tmp_path / "work", False, tmp_path)

    return run


@pytest.fixture(scope="session")
def smoke_runs(tmp_path_factory):
    """Returns a folder in which claims find the baselines that others have trained."""
    return tmp_path_factory.mktemp("smoke")


# They train teachers and students of several stages, as hedgehog and lit do.
STAGED = ("liger", "lolcats", "progressive", "shallow_ffn", "softmax_layers_kept")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if name in STAGED else [])
        for name in claims.names()
    ],
)
def test_every_claim_runs_at_smoke_size(name, smoke_runs, tmp_path):
    record = kept.make(name, Context(smoke_runs, claims.load(name).seeds, smoke=True))
    kept.write(record, tmp_path, tmp_path)
    assert kept.read(name, tmp_path) == record
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


@pytest.fixture
def optimized():
    """Compiles as users do, which pays for programs that run thousands of times."""
    quick = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"  # conftest.py
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_verdict_is_found_again(name, tmp_path_factory, optimized):
    shared = tmp_path_factory.getbasetemp() / "whole"  # one teacher for all of them
    record = kept.make(name, Context(shared, claims.load(name).seeds))
    assert record["holds"], kept.summary(record)


def test_every_claim_has_been_measured_or_the_gallery_says_that_it_has_not():
    measured = {path.stem for path in kept.RESULTS.glob("*.json")}
    assert measured <= set(claims.names())
    assert {path.stem for path in kept.PICTURES.glob("*.png")} == measured
    (text,) = gallery.made().values()
    assert text.count("not measured yet") == len(set(claims.names()) - measured)
    assert all(claims.load(name).title in text for name in claims.names())


@pytest.mark.parametrize("name", [name for name in claims.names() if kept.read(name)])
def test_a_kept_verdict_follows_from_the_kept_measurements(name):
    record = kept.read(name)
    assert not record["smoke"]
    assert kept.judged(name, record) == record, "python -m experiments.claims --judge"
    assert record["holds"] or record["tried"], "say what was tried"


def test_the_gallery_is_what_is_kept():
    for path, text in gallery.made().items():
        assert path.read_text() == text, "python -m experiments.claims --gallery"


def test_all_claims_fit_into_three_hours():
    minutes = {
        name: record["seconds"] / 60 if (record := kept.read(name)) else claims.load(name).minutes
        for name in claims.names()
    }
    assert max(minutes.values()) <= 15
    assert sum(minutes.values()) <= 180


def test_a_claim_that_holds_is_kept_and_shown(claimed, tmp_path, capsys):
    claimed({"ones": a_claim()})
    assert "ones: holds" in capsys.readouterr().out
    record = json.loads((tmp_path / "ones.json").read_text())
    assert record["measurements"] == {"value": [1.0, 1.0]}
    assert record["command"] == "python -m experiments.claims --only=ones"
    assert (tmp_path / "ones.png").exists()
    page = gallery.page([record])
    assert "1 of 1 hold" in page and "![Ones are less than twos](claims/ones.png)" in page
    assert "[arXiv 1234.56789](https://arxiv.org/abs/1234.56789), table 1" in page
    assert "| 1 \\| 2 | 1 (1 to 1) < 2 (2 to 2) | in every seed, less | yes |" in page


def test_a_claim_that_fails_is_shown_as_failed_with_what_was_tried(claimed, tmp_path, capsys):
    failing = {
        "judge": lambda measured: [claim.at_least("ones are two", measured["value"], 2.0)],
        "tried": "Counting twice.",
    }
    claimed({"ones": a_claim(**failing)})
    assert "ones: FAILED" in capsys.readouterr().out
    page = gallery.page([kept.read("ones", tmp_path)])
    assert "0 of 1 hold" in page and "**FAILED.** Counting twice." in page
    assert "| ones are two | 1 (1 to 1) | at least 2 | NO |" in page


def test_kept_measurements_are_judged_anew_without_a_run(claimed, tmp_path, monkeypatch):
    claimed({"ones": a_claim()})
    stricter = {"judge": lambda measured: [claim.at_least("high", measured["value"], 2.0)]}
    stricter = {"ones": a_claim(run=None, ours="the same", **stricter), "twos": a_claim()}
    monkeypatch.setattr(claims, "load", stricter.__getitem__)
    assert runner.judge(["ones", "twos"], tmp_path) == ["twos"]
    record = kept.read("ones", tmp_path)
    assert not record["holds"] and record["ours"] == "the same"


def test_a_claim_that_cannot_be_measured_does_not_stop_the_others(claimed, tmp_path):
    def broken(context):
        raise RuntimeError("no such thing")

    assert claimed({"broken": a_claim(run=broken), "ones": a_claim()}) == ["broken"]
    assert kept.read("ones", tmp_path)["holds"]
    assert kept.read("broken", tmp_path) is None


def test_an_unknown_claim_names_the_choices(claimed):
    with pytest.raises(
        cli.UserError, match="--only: unknown 'one'; choose from ones, twos, missing"
    ):
        claimed({"ones": a_claim(), "twos": a_claim()}, only=["one"])


def test_missing_are_those_without_a_kept_result(claimed, monkeypatch):
    monkeypatch.setattr(kept, "read", lambda name: {"kept": True} if name == "ones" else None)
    claimed({"ones": a_claim(), "twos": a_claim()})
    assert runner.chosen(["missing"]) == ("twos",)


def test_a_judge_without_checks_is_refused(claimed, capsys):
    assert claimed({"ones": a_claim(judge=lambda measured: [])}) == ["ones"]
    assert "ones: judge has to return" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_a_finished_one_is_read(tmp_path, monkeypatch):
    config = tiny.make_config(tmp_path)
    context = Context(tmp_path / "work", seeds=2)
    with monkeypatch.context() as patched:

        def requested(self, step):
            self.signal = signal.SIGTERM
            return step == 3

        patched.setattr(loop.StopSignals, "requested", requested)
        with pytest.raises(SystemExit):
            context.train(config, {"optimizer.learning_rate": 1e-3}, seed=1)
    run = context.train(config, {"optimizer.learning_rate": 1e-3}, seed=1)
    again = context.train(config, {"optimizer.learning_rate": 1e-3}, seed=1)
    assert run.workdir == again.workdir and run.result == again.result
    starts = json.loads((run.workdir / "run.json").read_text())
    assert [start["step"] for start in starts] == [0, 3]
    assert [step for step, _ in run.metrics()] == list(range(1, 7))
    # Its time is that of both halves, also in a context that only reads it.
    taken = json.loads((run.workdir / "seconds.json").read_text())
    reading = Context(tmp_path / "work")
    reading.train(config, {"optimizer.learning_rate": 1e-3}, seed=1)
    assert reading.seconds(0.0) == pytest.approx(taken, abs=0.1)

    # Scores of the parameters as they were, and of other data.
    scores = run.scores()
    assert scores.totals()["loss"] == pytest.approx(run.result["loss"])
    assert run.scores({"data.seq_len": 64}).totals()["tokens"] > 0
    batch = run.batches(1)[0]
    logits, _ = run.model.apply({"params": run.params}, batch["inputs"], batch["segment_ids"])
    assert logits.shape[:2] == batch["inputs"].shape


def test_changes_have_to_be_fields(tmp_path):
    config = tiny.make_config(tmp_path)
    assert changed(config, {"data.seq_len": 16}).data.seq_len == 16
    assert config.data.seq_len == 32
    for path in ("optimizer.rate", "optimise.learning_rate", "rate"):
        with pytest.raises(ValueError, match=f"no field '{path}' in the config"):
            changed(config, {path: 1})


@pytest.mark.parametrize(
    "small, large, options, holds",
    [
        (1.0, 2.0, {}, True),
        (1.0, 2.0, {"margin": 1.0}, False),
        ([1.0, 3.0], [2.0, 2.5], {}, False),
        ([1.0, 3.0], [2.0, 2.5], {"every_seed": False}, True),
        ([1.0, 3.0], [2.0, 2.5], {"every_seed": False, "margin": 0.5}, False),
    ],
)
def test_less(small, large, options, holds):
    assert claim.less("", small, large, **options).holds is holds


def test_bounds():
    assert claim.at_least("", [0.5, 0.7], 0.5).holds
    assert not claim.at_least("", [0.4, 0.7], 0.5).holds
    assert claim.at_most("", 0.5, 0.5).holds
    assert not claim.at_most("", [0.4, 0.7], 0.5).holds
