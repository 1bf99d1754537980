"""Scores a model on a split: loss, perplexity, accuracy, bits per byte; by position, by length."""

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.launch.cli import NonFiniteLoss
from experiments.training import steps
from experiments.training.steps import Program
from seqmodels import sharding


class Scores:
    """Sums of loss, correct predictions and tokens that the loss mask counts, in float64.

    In text the mask counts all tokens of all documents and the end of each document. So loss,
    accuracy and bits per byte include the cost of predicting where a text ends, while the bytes are
    those of the text alone.
    """

    def __init__(self):
        self._bytes = 0
        # Rows: loss, correct, tokens. Columns: positions 0 to T-1, lengths 0 to T.
        self._by_position = np.zeros((3, 0))
        self._by_length = np.zeros((3, 0))

    def add(self, batch: dict[str, np.ndarray], nll_BT: np.ndarray, correct_BT: np.ndarray) -> None:
        if not self._by_position.size:
            self._by_position, self._by_length = np.zeros((2, 3, nll_BT.shape[1] + 1))
        counts = batch["loss_mask"] > 0
        position_BT, length_BT = _places(batch["segment_ids"])
        rows = np.stack([nll_BT[counts], correct_BT[counts], np.ones(counts.sum())])
        for table, place_BT in ((self._by_position, position_BT), (self._by_length, length_BT)):
            for sums, row in zip(table, rows):
                sums += np.bincount(place_BT[counts], weights=row, minlength=sums.size)
        self._bytes += int(batch["num_bytes"][counts].sum())

    def totals(self) -> dict[str, float]:
        """Returns loss (nats per token), perplexity, accuracy, tokens; bits_per_byte of text."""
        nll, correct, tokens = self._by_position.sum(axis=1).tolist()
        if not tokens:
            raise ValueError("no token of this split counts in the loss: it is empty")
        loss = nll / tokens
        scores = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "accuracy": correct / tokens,
            "tokens": int(tokens),
        }
        if self._bytes > 0:
            scores |= {"bytes": self._bytes, "bits_per_byte": nll / math.log(2) / self._bytes}
        return scores

    def by_position(self, buckets: int = 16) -> list[dict]:
        """Returns a `bucket_table` of scores by the position of a prediction in its document."""
        return bucket_table(self._by_position, buckets)

    def late_loss(self) -> float:
        """Returns the mean loss at positions beyond 3/4 of the longest document that was scored."""
        nll, _, tokens = self._by_position[:, np.flatnonzero(self._by_position[2])[-1] * 3 // 4 :]
        return nll.sum() / tokens.sum()

    def by_length(self, buckets: int = 16) -> list[dict]:
        """Returns a `bucket_table` of scores by the length of a prediction's document."""
        return bucket_table(self._by_length, buckets)


def bucket_table(sums: np.ndarray, buckets: int) -> list[dict]:
    """Returns scores of positions or lengths, grouped into at most `buckets` ranges of equal width.

    sums: (3, positions or lengths); its rows are sums of loss, of correct predictions and of
      tokens.
    Each range that has tokens gives a dict: first, last, tokens, loss, perplexity, accuracy.
    """
    used = np.flatnonzero(sums[2])
    width = -(-(used[-1] - used[0] + 1) // buckets)
    table = []
    for first in range(used[0], used[-1] + 1, width):
        nll, correct, tokens = sums[:, first : first + width].sum(axis=1)
        if tokens:
            last = min(first + width - 1, used[-1])
            row = {"first": int(first), "last": int(last), "tokens": int(tokens)}
            row |= {"loss": nll / tokens, "perplexity": perplexity(nll / tokens)}
            table.append(row | {"accuracy": correct / tokens})
    return table


def perplexity(loss: float) -> float:
    """Returns exp(loss) of a loss in nats per token; inf from a loss of 700 on."""
    return math.exp(loss) if loss < 700 else math.inf


def check_finite(name: str, loss: float) -> None:
    """Raises NonFiniteLoss if `loss` is not finite, with `name`, the model, in the message."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"{name}: the loss is {loss}. Parameters have diverged, or the model computes in too "
            "narrow a dtype: score an earlier checkpoint (--step), or in float32"
        )


def evaluate(program: Program, params, dataset, max_batches: int | None = None) -> Scores:
    """Returns the scores of a model on a dataset, over all processes.

    max_batches: score only so many batches; None or 0 scores one whole pass.
    """
    scores = Scores()
    for batch in itertools.islice(dataset, max_batches or None):
        on_devices = program.put(batch)
        results = (batch, *program.token_losses(params, on_devices))
        if jax.process_count() > 1:
            results = multihost_utils.process_allgather((on_devices, *results[1:]), tiled=True)
        scores.add(*jax.device_get(results))
    return scores


def by_context(
    config, params, make_dataset, lengths: Sequence[int], max_batches: int | None = None
) -> dict[int, Scores]:
    """Returns context length -> scores of the same text, cut into rows of that many tokens.

    Each label counts once per context length, predicted from at most so many tokens before it.

    params: parameters of the model, as `steps.build(config, ...)` lays them out.
    make_dataset: function from a config to the split to score.
    lengths: context lengths in tokens.
    max_batches: limits the text to so many batches of the config's own size; None or 0: no limit.
    """
    scores = {}
    num_devices = sharding.make_mesh(config.mesh).size
    tokens = (config.data.eval_batch_size or config.data.batch_size) * config.data.get("seq_len", 0)
    for length in lengths:
        rows = -(-max(tokens // length, 1) // num_devices) * num_devices
        changed = config.copy_and_resolve_references()
        changed.data.update({"seq_len": length, "batch_size": rows, "eval_batch_size": 0})
        changed.train.accumulate = 1
        batches = -(-max_batches * tokens // (rows * length)) if max_batches else None
        program = steps.build(changed, length)
        scores[length] = evaluate(program, params, make_dataset(changed), batches)
    return scores


def _places(segment_ids_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns every token's position in its document (equal ids), and that document's length."""
    B, T = segment_ids_BT.shape
    starts_BT = np.ones((B, T), bool)
    starts_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    start_N = np.flatnonzero(starts_BT)
    length_N = np.diff(np.append(start_N, B * T))
    position_BT = np.arange(B * T) - np.repeat(start_N, length_N)
    return position_BT.reshape(B, T), np.repeat(length_N, length_N).reshape(B, T)
