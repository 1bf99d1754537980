"""Selective copying: repeat the data tokens that stand among blanks, in order.

Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752,
section 4.1.1 (sequences of 4096, a vocabulary of 16, 16 tokens to remember), after the selective
form of the copy task of arXiv 1901.07214.

Tokens 0 ... W-3 are data, W-2 is the blank, W-1 the marker. Of seq_len inputs the last num_tokens
are markers; the data tokens stand at random places before them, blanks at all others. The label at
the i-th marker is the i-th data token, and nothing else counts. seq_len counts the markers; the
paper does not say whether its 4096 does.
"""

import dataclasses

import numpy as np

from experiments.data.tasks import lengths


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(lengths.OneLength):
    """Options of selective copying, of `num_tokens` data tokens. Chance: 1/(vocab_size - 2)."""

    seq_len: int = 256
    num_tokens: int = 16
    eval_seq_len: int = 0
    vocab_size: int = 16

    def __post_init__(self):
        lengths.check(
            1 <= self.num_tokens <= self.seq_len - self.num_tokens,
            f"num_tokens={self.num_tokens} data tokens and as many markers do not fit into "
            f"seq_len={self.seq_len}.",
        )
        lengths.check(
            self.vocab_size >= 4,
            f"vocab_size must be at least 4 (two data tokens, blank, marker), got {self.vocab_size}.",
        )

    @property
    def chance(self) -> float:
        return 1.0 / (self.vocab_size - 2)

    def example(self, rng: np.random.Generator):
        start = self.seq_len - self.num_tokens
        data = rng.integers(0, self.vocab_size - 2, self.num_tokens)
        places = np.sort(rng.choice(start, self.num_tokens, replace=False))
        inputs = np.full(self.seq_len, self.vocab_size - 2)
        inputs[places] = data
        inputs[start:] = self.vocab_size - 1
        return inputs, *lengths.labelled(self.seq_len, slice(start, None), data)
