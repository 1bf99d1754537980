"""Every registered mixer through the shared suite."""

import pytest

from seqmodels import mixers
from tests.seqmodels.mixers import document_suite, layer_suite, mixer_suite

DIFFERENTIATED_IN_THE_FAST_SUITE = ("gla", "gated_delta_net", "mamba", "inline")
# Of mixers that see whole documents the fast suite has one of each kind.
WHOLE_IN_THE_FAST_SUITE = ("bidirectional", "full_attention", "inline", "mlp_mixer", "sana_video")
SLOW_TO_COMPILE = ("delta_net", "delta_product", "mamba", "mlstm")
# They are attention's projections around operators that others have: CI checks less of them.
STUDENTS = ("lawcat", "liger", "lolcats", "mmmamba", "selective")


def slow(cases, fast, exhaustive=lambda case: False):
    def marks(case):
        return (pytest.mark.exhaustive,) * exhaustive(case) + (pytest.mark.slow,) * (not fast(case))

    return [pytest.param(case, marks=marks(case)) for case in cases]


def is_fast(case):
    whole = not mixers.mixer_class(case.name).causal
    if whole and case.name not in WHOLE_IN_THE_FAST_SUITE:
        return False
    return case.variant == 0 and not is_student(case)


def is_fast_to_differentiate(case):
    return is_fast(case) and case.name in DIFFERENTIATED_IN_THE_FAST_SUITE


def is_student(case):
    return case.name in STUDENTS


def is_quick_to_compile(case):
    return is_fast(case) and case.name not in SLOW_TO_COMPILE or str(case) == "lolcats"


@pytest.mark.parametrize(
    "case", slow(mixer_suite.all_cases(causal=True), is_quick_to_compile), ids=str
)
def test_pieces_steps_and_packed_documents_agree(case):
    mixer_suite.check_consistency(case)


@pytest.mark.parametrize(
    "case",
    slow(
        mixer_suite.all_cases(causal=True),
        is_fast_to_differentiate,
        lambda c: is_student(c) and c.variant > 0,
    ),
    ids=str,
)
def test_gradients_are_finite_and_causal(case):
    mixer_suite.check_gradients(case)


@pytest.mark.parametrize("case", mixer_suite.all_cases(causal=True), ids=str)
def test_state_has_one_structure(case):
    mixer_suite.check_state(case)


@pytest.mark.parametrize("case", slow(mixer_suite.first_cases(), is_fast), ids=str)
def test_scan_over_layers(case):
    layer_suite.check_layers(case)


@pytest.mark.parametrize(
    "case",
    slow(mixer_suite.first_cases(), is_fast_to_differentiate, is_student),
    ids=str,
)
def test_trains(case):
    mixer_suite.check_trains(case)


@pytest.mark.parametrize("case", slow(mixer_suite.all_cases(causal=False), is_fast), ids=str)
def test_documents_are_apart_and_padding_has_no_effect(case):
    document_suite.check_documents(case)


@pytest.mark.parametrize(
    "case", slow(mixer_suite.all_cases(causal=False), is_fast_to_differentiate), ids=str
)
def test_gradients_are_finite_and_reach_the_whole_document(case):
    document_suite.check_gradients(case)


@pytest.mark.parametrize("case", mixer_suite.first_cases(causal=False), ids=str)
def test_mixers_of_whole_documents_refuse_states_and_language_models_refuse_them(case):
    document_suite.check_stateless(case)


def test_unknown_mixer_lists_the_choices():
    with pytest.raises(
        ValueError, match="unknown mixer 'gated_deltanet'; choose one of .*gated_delta_net"
    ):
        mixers.make("gated_deltanet", d_model=8)


def test_unknown_option_lists_those_there_are():
    with pytest.raises(ValueError, match="'attention' has no option 'heads'; it has .*num_heads"):
        mixers.make("attention", d_model=8, heads=2)
