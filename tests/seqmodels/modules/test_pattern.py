"""Patterns: what they mean, and the cut that compiles least."""

import pytest

from seqmodels.modules import pattern
from seqmodels.modules.pattern import MixerSpec


def test_repeats_options_and_groups():
    window = MixerSpec("attention", (("window", 8),))
    assert pattern.parse("2*gla + attention(window=8)") == (
        MixerSpec("gla"),
        MixerSpec("gla"),
        window,
    )
    assert pattern.parse("2*(gla + attention(window=8))") == (MixerSpec("gla"), window) * 2


def test_last_repetition_may_be_cut():
    names = [spec.name for spec in pattern.layers("2*a + b", 5)]
    assert names == ["a", "a", "b", "a", "a"]


@pytest.mark.parametrize(
    "bad",
    ["a +", "a - b", "0*a", "a*2", "a(8)", "a(window=size)", "a(**{'window': 8})", "1.5*a", ""],
)
def test_what_cannot_be_read_is_shown(bad):
    with pytest.raises(ValueError, match="pattern"):
        pattern.parse(bad)


@pytest.mark.parametrize(
    "text, num_layers",
    [("a(x=1)", 6), ("3*a + b(x='y', z=(1, 2.5, None))", 11), ("a + b", 1), ("2*a + b", 4)],
)
def test_layers_as_text_are_read_as_they_were(text, num_layers):
    specs = pattern.layers(text, num_layers)
    written = pattern.to_text(specs)
    assert pattern.layers(written, num_layers) == specs
    assert written == text or num_layers == 1


@pytest.mark.parametrize(
    ("text", "num_layers", "prefix", "period", "repeats", "suffix"),
    [
        ("a", 6, 0, 1, 6, 0),
        ("3*a + b", 12, 0, 4, 3, 0),
        ("3*a + b", 13, 0, 4, 3, 1),
        ("b + 23*a", 24, 1, 1, 23, 0),
        ("a + b + c", 3, 3, 0, 0, 0),
    ],
)
def test_scan_plan(text, num_layers, prefix, period, repeats, suffix):
    specs = pattern.layers(text, num_layers)
    plan = pattern.scan_plan(specs)
    assert plan.prefix + plan.period * plan.repeats + plan.suffix == specs
    assert (len(plan.prefix), len(plan.period), plan.repeats, len(plan.suffix)) == (
        prefix,
        period,
        repeats,
        suffix,
    )
