"""Parity of a bit string: the smallest task that needs a negative eigenvalue.

Source: "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", arXiv 2411.12537,
section 5.1 (after arXiv 2207.02098): trained on lengths 3-40, tested on 40-256, the answer scored.
Without a negative eigenvalue in its transition no recurrence solves it at every length (Theorem 1).

Inputs are bits; the label at a position is the parity of the bits up to and including it. Lengths
are uniform in [min_length, max_length], rows padded to max_length. (In the authors' data the length
counts the answer too, so theirs have one bit fewer.)
"""

import dataclasses

import numpy as np

from experiments.data.tasks import lengths


@dataclasses.dataclass(frozen=True)
class Parity(lengths.RandomLengths):
    """Options of parity of a bit string. Chance: 1/2.

    supervise: "last" is the paper's; "all" is a denser signal, which trains in fewer steps.
    """

    vocab_size = 2
    chance = 0.5

    def example(self, rng: np.random.Generator):
        bits = rng.integers(0, 2, self.draw_length(rng))
        mask = lengths.last_only(len(bits))
        if self.supervise == "all":
            mask[self.min_length - 1 :] = 1.0
        return bits, np.bitwise_xor.accumulate(bits), mask
