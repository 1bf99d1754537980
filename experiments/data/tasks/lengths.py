"""Checks and masks that the tasks share. `make_task` adds the task's name to errors."""

import numpy as np


def check(ok: bool, message: str):
    if not ok:
        raise ValueError(message)


def check_lengths(low: int, high: int, least: int = 1):
    check(
        least <= low <= high,
        f"lengths must satisfy {least} <= min_length <= max_length, got min_length={low} and "
        f"max_length={high}.",
    )


def check_supervise(supervise: str):
    check(
        supervise in ("all", "last"),
        f"unknown supervise={supervise!r}; the choices are 'all' and 'last'.",
    )


def last_only(length: int) -> np.ndarray:
    """Returns a loss mask that counts the last position."""
    mask = np.zeros(length, np.float32)
    mask[-1] = 1.0
    return mask
