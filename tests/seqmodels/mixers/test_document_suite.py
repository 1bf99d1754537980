"""The suite of mixers that see whole documents finds what it looks for."""

import functools

import jax.numpy as jnp
import pytest

from seqmodels import mixers
from seqmodels.mixers import base
from seqmodels.operators import document_totals
from tests.seqmodels.mixers import document_suite, layer_suite, mixer_suite


class Means(base.WholeDocumentMixer):
    """A mixer whose output is W_o of each token's projection times its document's mean.

    Attributes:
      mistake: what is wrong with it; None is nothing.
    """

    mistake: str | None = None

    uses_positions = False

    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        if self.mistake != "takes a state":
            self.check_no_state(state)
        return self._outputs(x_BTD, segment_ids_BT), None

    @base.nn.compact
    def _outputs(self, x_BTD, segment_ids_BT):
        q_BTHV, v_BTHV = (self.project_heads(x_BTD, 4, self.d_model // 4, name) for name in "qv")
        if self.mistake == "uses positions":
            index_T = jnp.arange(v_BTHV.shape[1], dtype=v_BTHV.dtype)
            v_BTHV = v_BTHV * jnp.cos(index_T)[None, :, None, None]
        whole = functools.partial(document_totals, segment_ids_BT=segment_ids_BT)
        count_BT11 = whole(jnp.ones_like(v_BTHV[:, :, :1, :1]))
        if self.mistake == "counts the row":
            count_BT11 = jnp.full_like(count_BT11, v_BTHV.shape[1])
        mean_BTHV = whole(v_BTHV) / count_BT11
        if self.mistake == "sees other documents":
            mean_BTHV = mean_BTHV + 1e-6 * jnp.mean(v_BTHV, axis=1, keepdims=True)
        if self.mistake == "sees other rows":
            mean_BTHV = mean_BTHV + 2e-6 * jnp.roll(v_BTHV, 1, axis=0)
        if self.mistake == "sees only itself":
            mean_BTHV = v_BTHV
        o_BTHV = (1.0 + q_BTHV.astype(jnp.float32)) * mean_BTHV
        return self.merge_heads(o_BTHV.astype(self.dtype))


@pytest.fixture
def make_case(monkeypatch):
    """Returns a function of a mistake that registers the mixer with it and returns its case."""

    def registered(mistake):
        monkeypatch.setitem(mixer_suite.SMALL_OPTIONS, "means", ({"mistake": mistake},))
        monkeypatch.setitem(mixers._MIXERS, "means", ("base", "Means"))
        monkeypatch.setattr(base, "Means", Means, raising=False)
        monkeypatch.setattr(Means, "__module__", "seqmodels.mixers.means")
        for cached in (mixer_suite.initial_params, mixer_suite.training_step):
            cached.cache_clear()
        return mixer_suite.Case("means")

    return registered


def test_a_sound_mixer_passes(make_case):
    case = make_case(None)
    assert mixer_suite.first_cases(causal=False).count(case) == 1
    assert case not in mixer_suite.all_cases(causal=True)
    document_suite.check_documents(case)
    document_suite.check_gradients(case)
    document_suite.check_stateless(case)
    layer_suite.check_layers(case)
    mixer_suite.check_trains(case)


@pytest.mark.parametrize(
    "mistake, message",
    {
        "counts the row": "packed, against 1 tokens alone",
        "uses positions": "tokens reversed|alone",
        "sees other documents": "another document or padding is seen",
        "sees other rows": "rows in another order|another document",
    }.items(),
)
def test_a_mistake_is_found(make_case, mistake, message):
    with pytest.raises(AssertionError, match=message):
        document_suite.check_documents(make_case(mistake))


def test_a_missing_token_and_a_state_that_is_taken_are_found(make_case):
    with pytest.raises(AssertionError, match="no earlier token is seen"):
        document_suite.check_gradients(make_case("sees only itself"))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        document_suite.check_stateless(make_case("takes a state"))
