"""Checks that the tasks share."""

import numpy as np


def check(task: str, ok: bool, message: str):
    if not ok:
        raise ValueError(f"{task}: {message}")


def check_lengths(task: str, low: int, high: int, least: int = 1):
    check(
        task,
        least <= low <= high,
        f"lengths must satisfy {least} <= min_length <= max_length, got min_length={low} and "
        f"max_length={high}.",
    )


def check_supervise(task: str, supervise: str):
    check(
        task,
        supervise in ("all", "last"),
        f"unknown supervise={supervise!r}; the choices are 'all' and 'last'.",
    )


def last_only(length: int) -> np.ndarray:
    """A loss mask that counts the last position."""
    mask = np.zeros(length, np.float32)
    mask[-1] = 1.0
    return mask
