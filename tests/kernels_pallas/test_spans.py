"""How long spans are."""

import pytest

from kernels_pallas import spans, targets


@pytest.mark.parametrize(
    "chunks, heads, widest, expected",
    [
        (32, 4, 64, 4),  # 16 pairs
        (32, 4, 256, 1),  # 4
        (10, 4, 64, 4),  # 4, 4 and 2: no more even with three
        (9, 4, 64, 3),  # 3, 3 and 3, not 4, 4 and 1
        (3, 1, 64, 3),  # no longer than the sequence
        (32, 100, 64, 1),  # every head, at least one chunk
        (32, 1, 4096, 1),
    ],
)
def test_on_cpu_a_span_stays_in_cache(chunks, heads, widest, expected):
    assert spans.chunks_in_one(chunks, heads, widest, accelerator_pairs=64) == expected


def test_on_an_accelerator_it_is_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(targets, "current", lambda: targets.Target("gpu", "any"))
    assert spans.chunks_in_one(32, 4, 64) == 32
    assert spans.chunks_in_one(32, 4, 64, accelerator_pairs=64) == 16
    assert spans.chunks_in_one(32, 100, 64, accelerator_pairs=64) == 1
