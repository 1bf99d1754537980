"""Scores how likely a model finds token sequences of any lengths, packed several to a row."""

import functools
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from seqmodels import operators
from seqmodels.text import sampling

MIN_ROW = 64


@functools.partial(jax.jit, static_argnames="model")
def _nll_and_correct(model, params, batch):
    def head(x_BTD, matrix, layout):
        return operators.linear_cross_entropy(
            x_BTD, matrix, batch["labels"], layout=layout, logit_softcap=model.logit_softcap
        )

    inputs = batch["inputs"], batch["segment_ids"]
    (_, details), _ = model.apply({"params": params}, *inputs, head=head)
    return details.nll_BT, details.correct_BT


def score(
    model, params, sequences: Sequence[Sequence[int]], *, tokens_a_batch: int = 4096
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the scores (nll_N, correct_N) of each sequence's tokens, except its first token.

    nll_N is each token's -log p (float32, nats) given the tokens before it, and correct_N whether
    it is the most likely token.

    Several sequences are packed into a row, each as a document of its own, so that no sequence sees
    another. All rows have one length: the power of two, at least 64, that holds the longest
    sequence, or the number of learned positions if that is less. A batch has as many rows as fit
    into tokens_a_batch, but at least one. One program is compiled.

    Raises ValueError for a sequence of fewer than two tokens, or of more than the model has learned
    positions for, and for ids outside the vocabulary.
    """
    for i, sequence in enumerate(sequences):
        what = f"sequence {i} of {len(sequences)} has {len(sequence)} tokens"
        if len(sequence) < 2:
            raise ValueError(f"{what}; scoring takes two: a given one, and one that is scored")
        positions = model.learned_positions
        if positions is not None and len(sequence) - 1 > positions:
            raise ValueError(f"{what}, and the model has learned {positions} positions")
        sampling.check_ids(model, sequence)
    if not sequences:
        return []
    T = max(MIN_ROW, 1 << (max(map(len, sequences)) - 2).bit_length())
    T = min(T, model.learned_positions or T)
    B = max(1, tokens_a_batch // T)
    rows = list(_rows([len(sequence) - 1 for sequence in sequences], T))
    scores: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0))] * len(sequences)
    for first in range(0, len(rows), B):
        # Pack a batch, and remember where each sequence lies.
        places = {}
        batch = {key: np.zeros((B, T), np.int32) for key in ("inputs", "labels", "segment_ids")}
        for row, numbers in enumerate(rows[first : first + B]):
            start = 0
            for segment, number in enumerate(numbers, start=1):
                tokens = np.asarray(sequences[number], np.int32)
                place = places[number] = (row, slice(start, start + len(tokens) - 1))
                batch["inputs"][place], batch["labels"][place] = tokens[:-1], tokens[1:]
                batch["segment_ids"][place] = segment
                start += len(tokens) - 1
        nll_BT, correct_BT = jax.device_get(_nll_and_correct(model, params, batch))
        for number, place in places.items():
            scores[number] = nll_BT[place], correct_BT[place] > 0
    return scores


def _rows(lengths: Sequence[int], row_length: int) -> Iterator[list[int]]:
    """Packs sequences into rows of `row_length` tokens; yields the list of sequences in each row.

    lengths: tokens per sequence. A row takes the longest sequence that is left, then the shortest
    ones as long as they fit; sequences are given by their indices.
    """
    left = deque(sorted(range(len(lengths)), key=lambda number: -lengths[number]))
    while left:
        row = [left.popleft()]
        room = row_length - lengths[row[0]]
        while left and lengths[left[-1]] <= room:
            row.append(left.pop())
            room -= lengths[row[-1]]
        yield row
