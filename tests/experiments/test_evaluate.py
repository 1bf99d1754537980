import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.inference import pretrained, subjects
from experiments.launch import cli
from experiments.training import evaluation, metrics, plots, steps
from seqmodels import language_model
from seqmodels.text import scoring
from tests.experiments import tiny


@pytest.fixture
def batch():
    return {
        # Documents of lengths 3 and 2, and padding; then one of 6.
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32),
        "loss_mask": np.array([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]], np.float32),
        # The last document's end takes back a byte, and padding would count if it were read.
        "num_bytes": np.array([[1, 2, 9, 5, 9, 9], [2, 2, 2, 2, -1, 9]], np.int32),
    }


def score(batch):
    nll_BT = np.arange(12, dtype=np.float32).reshape(2, 6)
    correct_BT = (nll_BT % 2).astype(np.float32)
    scores = evaluation.Scores()
    scores.add(batch, nll_BT, correct_BT)
    return scores


def test_totals_are_means_over_the_tokens_that_count(batch):
    totals = score(batch).totals()
    nll = [0, 1, 3, 6, 7, 8, 9, 10]
    assert totals["tokens"] == 8 and all(type(value) in (int, float) for value in totals.values())
    assert totals["loss"] == pytest.approx(np.mean(nll))
    assert totals["perplexity"] == pytest.approx(math.exp(np.mean(nll)))
    assert totals["accuracy"] == pytest.approx(4 / 8)
    assert totals["bytes"] == 1 + 2 + 5 + 4 * 2 - 1
    assert totals["bits_per_byte"] == pytest.approx(sum(nll) / math.log(2) / totals["bytes"])
    of_a_task = batch | {"num_bytes": np.zeros((2, 6), np.int32)}
    assert "bytes" not in score(of_a_task).totals()


def test_what_needs_text_is_told_of_runs_that_have_none(tmp_path):
    config = tiny.make_config(tmp_path)
    config.data = data.default_config("mqar")
    with pytest.raises(cli.UserError, match="'mqar', is not text: --retrieval needs a language"):
        subjects.of_run(config, "nowhere", None, asked=["retrieval"])
    with pytest.raises(ValueError, match="'mqar', is not text: there is nothing to generate"):
        pretrained.load_run(config, "nowhere")
    config.model.vocab_size, config.mesh.data = 60, -1
    config.data = data.default_config("python_stdlib")
    with pytest.raises(ValueError, match="ids up to 256, and the model a vocabulary of 60"):
        subjects.read_split(config, "test")
    flags = {"model": "folder", "data": "text", "workdir": None}
    assert subjects.config_of(flags.get).data.name == "text"
    with pytest.raises(cli.UserError, match="not both"):
        subjects.config_of((flags | {"workdir": "run"}).get)


def test_batches_add_up(batch):
    once, twice = score(batch), score(batch)
    twice.add(batch, np.zeros((2, 6), np.float32), np.ones((2, 6), np.float32))
    assert twice.totals()["tokens"] == 16
    assert twice.totals()["loss"] == pytest.approx(once.totals()["loss"] / 2)


def test_positions_start_anew_in_each_document(batch):
    table = score(batch).by_position(buckets=6)
    assert [(row["first"], row["last"], row["tokens"]) for row in table] == [
        (0, 0, 3), (1, 1, 2), (2, 2, 1), (3, 3, 1), (4, 4, 1),
    ]  # fmt: skip
    assert [row["loss"] for row in table] == pytest.approx([(0 + 3 + 6) / 3, (1 + 7) / 2, 8, 9, 10])


def test_lengths_are_those_of_the_documents(batch):
    table = score(batch).by_length(buckets=6)
    assert [(row["first"], row["tokens"], row["accuracy"]) for row in table] == [
        (2, 1, 1.0), (3, 2, 0.5), (6, 5, pytest.approx(2 / 5)),
    ]  # fmt: skip


def test_buckets_hold_every_token_once(batch):
    for buckets in (1, 2, 3):
        table = score(batch).by_position(buckets)
        assert len(table) <= buckets
        assert sum(row["tokens"] for row in table) == 8
        assert table[0]["first"] == 0 and table[-1]["last"] == 4


def test_a_split_without_tokens_is_refused(batch):
    batch["loss_mask"][:] = 0
    with pytest.raises(ValueError, match="no token"):
        score(batch).totals()


def test_a_loss_that_says_nothing_is_refused(batch):
    batch["num_bytes"][:] = 1
    evaluation.check_finite("a run", score(batch).totals()["loss"])
    with pytest.raises(cli.NonFiniteLoss, match=r"a run, step 3: the loss is nan\. Parameters"):
        evaluation.check_finite("a run, step 3", math.nan)


def test_pictures_are_written(batch, tmp_path):
    rows = [{"step": n, "loss": 5 / n} for n in range(1, 30)]
    rows += [{"step": 10, "validation_loss": 0.6}, {"step": 29, "test_loss": 0.5}]
    plots.loss_curve(rows, tmp_path / "loss.png", "bits a byte", 1.44, {"gzip": 2.0})
    plots.loss_curve([], tmp_path / "empty.png")
    plots.bucket_curve(score(batch).by_position(), "position", tmp_path / "position.png")
    for name in ("loss", "empty", "position"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_smoothed_curve_keeps_constants_and_ends():
    np.testing.assert_allclose(plots._smooth(np.full(200, 3.0)), 3.0)
    line = np.arange(300.0)
    np.testing.assert_allclose(plots._smooth(line)[50:-50], line[50:-50])


class Extras:
    tensorboard, wandb = False, ""


def test_metrics_are_lines_of_json_and_rows_after_the_checkpoint_go(tmp_path):
    writer = metrics.MetricWriter(Extras, tmp_path)
    for step in (1, 2, 3):
        writer.write(step, loss=1.0 / step)
    writer.write(3, test_loss=0.1)
    # Written as it happens, not at the end.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 2, "loss": 0.5} and len(lines) == 4
    writer.close()
    resumed = metrics.MetricWriter(Extras, tmp_path, start_step=2)
    resumed.write(3, loss=0.25)
    resumed.close()
    assert [row["loss"] for row in metrics.read_metrics(tmp_path)] == [1.0, 0.5, 0.25]


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(metrics.importlib, "import_module", missing)
    for extra, value in (("tensorboard", True), ("wandb", "project")):
        config = type("Config", (Extras,), {extra: value})
        with pytest.raises(ValueError, match=rf"pip install '.\[{extra}\]'"):
            metrics.MetricWriter(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_wandb_without_a_key_is_told_before_anything_is_written(tmp_path, monkeypatch):
    class NoKey(Exception):
        pass

    def init(**options):
        assert options["project"] == "mine" and options["config"] == {"a": 1}
        raise NoKey("api_key not configured (no-tty)")

    wandb = types.SimpleNamespace(Error=NoKey, init=init)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = type("Config", (Extras,), {"wandb": "mine", "to_dict": lambda self: {"a": 1}})()
    with pytest.raises(ValueError, match=r"'mine', .* api_key not configured .* WANDB_API_KEY"):
        metrics.MetricWriter(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_packed_sequences_score_as_they_do_alone():
    model = language_model.from_config(
        {"vocab_size": 11, "d_model": 16, "num_layers": 2, "pattern": "gated_delta_net(num_heads=2) + attention(num_heads=2)"}
    )  # fmt: skip
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda p: 4 * p if p.ndim > 1 else p, params)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 11, n).tolist() for n in (30, 2, 17, 40, 9, 25, 3, 12)]
    jax.clear_caches()
    found = scoring.score(model, params, sequences, tokens_a_batch=128)

    @jax.jit
    def alone(tokens_BT):
        return jax.nn.log_softmax(model.apply({"params": params}, tokens_BT)[0])

    for sequence, (nll_N, correct_N) in zip(sequences, found):
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(sequence)] = sequence
        logp_NW = np.asarray(alone(padded))[0, : len(sequence) - 1]
        np.testing.assert_allclose(
            nll_N, -logp_NW[np.arange(len(sequence) - 1), sequence[1:]], atol=1e-4
        )
        np.testing.assert_array_equal(correct_N, logp_NW.argmax(1) == sequence[1:])
    assert scoring._nll_and_correct._cache_size() == 1
    assert scoring.score(model, params, []) == []
    for bad, message in (
        ([[1, 2], [3]], "sequence 1 of 2 has 1 tokens"),
        ([[1, 11]], "token id 11"),
    ):
        with pytest.raises(ValueError, match=message):
            scoring.score(model, params, bad)


def test_every_length_of_context_scores_the_same_targets(tmp_path):
    config = tiny.make_config(tmp_path)
    config.data.document_bytes = 4000  # longer than any row
    config.data.eval_batch_size = config.mesh.data = 8
    config.model.vocab_size = 257
    program = steps.build(config, 32)
    params = program.init(0).params
    scores = evaluation.by_context(
        config, params, lambda c: data.make_dataset(c.data, "test"), [8, 64], max_batches=0
    )
    short, long = scores[8].totals(), scores[64].totals()
    assert short["tokens"] == long["tokens"] and short["bytes"] == long["bytes"] > 1000
    assert scores[8].by_position(99)[-1]["last"] == 7
    assert scores[64].by_position(99)[-1]["last"] == 63
    row = scores[64].by_position(1)[0]
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"])) and scores[64].late_loss() > 0
    few = evaluation.by_context(
        config, params, lambda c: data.make_dataset(c.data, "test"), [8, 64], max_batches=2
    )
    assert few[8].totals()["tokens"] == pytest.approx(few[64].totals()["tokens"], rel=0.05)
    plots.loss_by_position({"8": scores[8].by_position()}, tmp_path / "context.png")
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")
