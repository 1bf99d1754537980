"""Multi-query associative recall: how much a state of fixed size can look up.

Source: "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927,
section 3 and Figure 2, and its authors' generator (HazyResearch/zoology).

The first 2D tokens are D pairs: key, value, key, value, ... Keys are drawn from [1, W/2) and values
from [W/2, W), both without replacement. Each key comes once more, as a query, at position
2D + 2 gap; the D gaps are drawn without replacement from 0 ... (N - 2D)/2 - 1 with weights
(gap + 1)^(power_a - 1), so near queries are likelier. The label at a query is the key's value, and
nothing else counts. All other positions hold random tokens of the whole vocabulary, or 0.

Figure 2 takes (N, D) in (64, 4), (128, 8), (256, 16), (512, 64), 100k training examples and 3k for
testing, vocabulary 8192. The authors' later configs train on a mixture of them and test on each.
"""

import dataclasses

import numpy as np

from experiments.data.tasks import lengths


@dataclasses.dataclass(frozen=True)
class MQAR(lengths.OneLength):
    """MQAR with seq_len N, even and at least 4 D, and num_pairs D.

    seq_len is even and at least 4 D. Chance: 1/vocab_size, or 2/vocab_size knowing that answers are
    values.

    random_non_queries: whether random tokens fill the other positions; else zeros.
    power_a: the smaller, the nearer are queries to their pairs.
    min_pairs: a training example has N and D, or both halved any number of times that leaves at
      least this many pairs, each equally likely. 0 never halves. Other splits halve only if
      eval_min_pairs is given.
    """

    seq_len: int = 64
    num_pairs: int = 4
    eval_seq_len: int = 0
    eval_num_pairs: int = 0
    min_pairs: int = 0
    eval_min_pairs: int = -1
    vocab_size: int = 8192
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self):
        n, d, w = self.seq_len, self.num_pairs, self.vocab_size
        lengths.check(
            d >= 1 and n % 2 == 0 and n >= 4 * d,
            f"seq_len must be even and at least 4 num_pairs (pairs, then queries at every second "
            f"place): got seq_len={n}, num_pairs={d}.",
        )
        lengths.check(
            w % 2 == 0 and w // 2 > d,
            f"vocab_size must be even and hold num_pairs={d} keys in [1, vocab_size/2), got {w}.",
        )
        sizes = [(n, d, self._weights(n, d))]
        while self.min_pairs > 0 and d // 2 >= self.min_pairs and n % 4 == d % 2 == 0:
            n, d = n // 2, d // 2
            sizes.append((n, d, self._weights(n, d)))
        object.__setattr__(self, "_sizes", sizes)

    def _weights(self, n: int, d: int) -> np.ndarray:
        return np.arange(1.0, (n - 2 * d) // 2 + 1) ** (self.power_a - 1.0)

    @property
    def chance(self) -> float:
        return 1.0 / self.vocab_size

    def example(self, rng: np.random.Generator):
        size = rng.integers(len(self._sizes)) if self.min_pairs > 0 else 0
        n, d, weights = self._sizes[size]
        half = self.vocab_size // 2
        keys = 1 + rng.choice(half - 1, d, replace=False)
        values = half + rng.choice(half, d, replace=False)
        # The first d arrivals of exponential clocks draw gaps by weight without replacement.
        arrivals = rng.standard_exponential(len(weights)) / weights
        queries = 2 * d + 2 * np.argsort(arrivals)[:d]
        if self.random_non_queries:
            inputs = rng.integers(0, self.vocab_size, n)
        else:
            inputs = np.zeros(n, np.int64)
        inputs[0 : 2 * d : 2], inputs[1 : 2 * d : 2] = keys, values
        inputs[queries] = keys
        return inputs, *lengths.labelled(n, queries, values)
