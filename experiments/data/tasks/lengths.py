"""Options, labels and loss masks that tasks share; `make_task` adds the task's name to errors."""

import dataclasses

import numpy as np


def check(ok: bool, message: str):
    if not ok:
        raise ValueError(message)


def labelled(length: int, places, values) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels and loss mask, both of `length`, for examples scored at some positions only.

    places, values: those positions and their labels. Elsewhere labels and mask are 0.
    """
    labels, mask = np.zeros(length, np.int64), np.zeros(length, np.float32)
    labels[places], mask[places] = values, 1.0
    return labels, mask


def last_only(length: int) -> np.ndarray:
    """Returns a loss mask of `length` positions in which only the last one counts."""
    mask = np.zeros(length, np.float32)
    mask[-1] = 1.0
    return mask


class OneLength:
    """A task all of whose rows have seq_len tokens."""

    seq_len: int

    @property
    def row_length(self) -> int:
        return self.seq_len


@dataclasses.dataclass(frozen=True)
class RandomLengths:
    """Options of tasks whose lengths are uniform in [min_length, max_length], with padded rows.

    eval_min_length, eval_max_length: the same for validation and test.
    supervise: "last" (only the answer at the end is a label) or "all" (so is that of every prefix).
    """

    min_length: int = 3
    max_length: int = 40
    eval_min_length: int = 40
    eval_max_length: int = 256
    supervise: str = "last"

    least_length = 1

    def __post_init__(self):
        low, high, least = self.min_length, self.max_length, self.least_length
        check(
            least <= low <= high,
            f"lengths must satisfy {least} <= min_length <= max_length, got min_length={low} and "
            f"max_length={high}.",
        )
        check(
            self.supervise in ("all", "last"),
            f"unknown supervise={self.supervise!r}; the choices are 'all' and 'last'.",
        )

    @property
    def row_length(self) -> int:
        return self.max_length

    def draw_length(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.min_length, self.max_length + 1))
