"""The word problem of a permutation group: keep track of a product of its elements.

Source: "The Illusion of State in State-Space Models", arXiv 2404.08819, as used by DeltaProduct,
arXiv 2502.10297, section 5.1 (S3, S4, A5, S5: trained on length 128, tested on 512), and by arXiv
2411.12537, section 5.2 (S5, with only swaps, and with 4 tokens per element).

A token is a group element g_t. The label at every position is the product of all so far,
p_t = g_t p_(t-1): p_t(i) = g_t(p_(t-1)(i)). The elements are the permutations of the group in
lexicographic order, so the identity is 0.
"""

import dataclasses
import functools
import itertools

import numpy as np

from experiments.data.tasks import lengths

GROUPS = ("S2", "S3", "S4", "S5", "A3", "A4", "A5")


@functools.cache
def group_elements(group: str) -> np.ndarray:
    """Returns the group's permutations of 0 ... n-1, one per row: (order, n)."""
    every = itertools.permutations(range(int(group[1:])))
    return np.asarray([p for p in every if group[0] == "S" or _swaps(p) % 2 == 0])


def _swaps(permutation) -> int:
    """Returns the number of a permutation's inversions, whose parity is the permutation's."""
    return sum(a > b for a, b in itertools.combinations(permutation, 2))


@functools.cache
def product_table(group: str) -> np.ndarray:
    """Returns a group's product table: [a, b] is the element "first b, then a", by index."""
    elements = group_elements(group)
    index = {tuple(p): i for i, p in enumerate(elements.tolist())}
    return np.asarray([[index[tuple(a[b].tolist())] for b in elements] for a in elements])


@dataclasses.dataclass(frozen=True)
class WordProblem(lengths.OneLength):
    """A group's word problem. Chance: 1/|G|.

    group: one of GROUPS.
    seq_len: T, counting fillers.
    swaps_only: draw only the identity and elements that exchange two points (S groups alone).
    tokens_per_element: n > 1 puts n - 1 fillers after each element, and its label at the last one.
    """

    group: str = "S3"
    seq_len: int = 128
    eval_seq_len: int = 512
    swaps_only: bool = False
    tokens_per_element: int = 1

    def __post_init__(self):
        n = self.tokens_per_element
        lengths.check(
            self.group in GROUPS,
            f"unknown group {self.group!r}; the choices are {', '.join(GROUPS)}.",
        )
        lengths.check(
            n >= 1 and self.seq_len >= 1 and self.seq_len % n == 0,
            f"seq_len={self.seq_len} must be a multiple of tokens_per_element={n}.",
        )
        lengths.check(
            not self.swaps_only or self.group[0] == "S",
            f"swaps_only needs a symmetric group, {self.group} holds no swap.",
        )
        moved = (group_elements(self.group) != np.arange(int(self.group[1:]))).sum(-1)
        drawn = np.flatnonzero(moved <= 2) if self.swaps_only else np.arange(len(moved))
        object.__setattr__(self, "_drawn", drawn)

    @property
    def order(self) -> int:
        return len(group_elements(self.group))

    @property
    def vocab_size(self) -> int:
        return self.order + (self.tokens_per_element > 1)

    @property
    def chance(self) -> float:
        return 1.0 / self.order

    def example(self, rng: np.random.Generator):
        n = self.tokens_per_element
        elements = self._drawn[rng.integers(0, len(self._drawn), self.seq_len // n)]
        table = product_table(self.group).tolist()
        products = list(itertools.accumulate(elements.tolist(), lambda p, g: table[g][p]))
        inputs = np.full(self.seq_len, self.order)
        inputs[::n] = elements
        mask = np.zeros(self.seq_len, np.float32)
        mask[n - 1 :: n] = 1.0
        return inputs, np.repeat(products, n), mask
