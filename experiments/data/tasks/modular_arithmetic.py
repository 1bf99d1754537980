"""Modular arithmetic: the value of an arithmetic expression modulo m.

Source: arXiv 2411.12537, section 5.1 and Table 3 ("mod. arithmetic", without and with brackets;
m = 5), after "Neural Networks and the Chomsky Hierarchy", arXiv 2207.02098. Trained on lengths
3-40, tested on 40-256.

Tokens: 0 ... m-1 are the numbers, then + - * ( ) = in this order. The last input is "=", with the
value as its label. Lengths count every token, "=" too, and are uniform in [min_length, max_length].

Without brackets numbers and operators alternate, "2+3*4-1=": every operator is equally likely, and
* binds closer than + and -. Such a length is even, so odd draws are rounded down. With brackets the
expression is a random tree: a number, -number, either in brackets, or (left op right), where the
size of the left side is uniform. The generators of both papers leave * out where there are brackets
(multiply=False), unless told otherwise.
"""

import dataclasses

import numpy as np

from experiments.data.tasks import lengths

OPERATORS = "+-*()="


@dataclasses.dataclass(frozen=True)
class ModularArithmetic(lengths.RandomLengths):
    """Options of modular arithmetic. Chance: 1/modulus.

    supervise: "last" (the paper's) or, without brackets, "all": from min_length on every number
      also has a label, the value of the expression so far.
    brackets, multiply: whether expressions have brackets, and the operator *.
    """

    modulus: int = 5
    brackets: bool = False
    multiply: bool = True

    least_length = 2

    def __post_init__(self):
        super().__post_init__()
        lengths.check(self.modulus >= 2, f"modulus must be at least 2, got {self.modulus}.")
        lengths.check(
            not (self.brackets and self.supervise == "all"),
            "supervise='all' has no meaning inside brackets; take supervise='last'.",
        )

    @property
    def vocab_size(self) -> int:
        return self.modulus + len(OPERATORS)

    @property
    def chance(self) -> float:
        return 1.0 / self.modulus

    def example(self, rng: np.random.Generator):
        length = self.draw_length(rng)
        if not self.brackets:
            return self._chain(rng, length // 2)
        tokens, value = self._tree(rng, length - 1, "+-*" if self.multiply else "+-")
        inputs = np.asarray(tokens + [self._token("=")])
        labels = np.full(len(inputs), value)
        return inputs, labels, lengths.last_only(len(inputs))

    def _token(self, operator: str) -> int:
        return self.modulus + OPERATORS.index(operator)

    def _chain(self, rng, count: int):
        kinds = 3 if self.multiply else 2
        numbers = rng.integers(0, self.modulus, count)
        operators = rng.integers(0, kinds, count - 1)
        values = np.empty(count, np.int64)
        total, term = 0, int(numbers[0])  # the value so far is total + term
        values[0] = term
        for i, operator in enumerate(operators):
            number = int(numbers[i + 1])
            if operator == 2:
                term = term * number % self.modulus
            else:
                total, term = total + term, number if operator == 0 else -number
            values[i + 1] = (total + term) % self.modulus
        inputs = np.empty(2 * count, np.int64)
        inputs[0::2] = numbers
        inputs[1:-1:2] = self.modulus + operators
        inputs[-1] = self._token("=")
        mask = lengths.last_only(2 * count)
        if self.supervise == "all":
            mask[0::2][self.min_length // 2 - 1 :] = 1.0
        return inputs, np.repeat(values, 2), mask

    def _tree(self, rng, length: int, operators: str) -> tuple[list[int], int]:
        """Returns a random expression of exactly `length` tokens, and its value."""
        token, number = self._token, int(rng.integers(0, self.modulus))
        leaf = {
            1: ([number], number),
            2: ([token("-"), number], -number % self.modulus),
            3: ([token("("), number, token(")")], number),
            4: ([token("("), token("-"), number, token(")")], -number % self.modulus),
        }
        if length in leaf:
            return leaf[length]
        left_length = int(rng.integers(1, length - 3))
        left, a = self._tree(rng, left_length, operators)
        right, b = self._tree(rng, length - 3 - left_length, operators)
        operator = operators[rng.integers(0, len(operators))]
        value = {"+": a + b, "-": a - b, "*": a * b}[operator] % self.modulus
        return [token("("), *left, token(operator), *right, token(")")], value
