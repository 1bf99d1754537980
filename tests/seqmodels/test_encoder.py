"""Encoders: packed documents stand alone, pooling is a mean, places reach the layers; folding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import language_model, mixers, models
from seqmodels.encoder import Encoder
from seqmodels.language_model import LanguageModel
from seqmodels.modules import blocks, channel_mixers, folding, norms
from seqmodels.modules.pattern import MixerSpec

GRID, E, D = (2, 3), 5, 16
BASE = {
    "architecture": "encoder",
    "pattern": "linear_attention(num_heads=2) + full_attention(num_heads=2, rope_base=10.0)",
    "num_layers": 4,
    "d_model": D,
    "d_ff": 24,
    "num_classes": 3,
    "input_dim": E,
    "grid": GRID,
}
IDS = np.array([[1] * 6 + [2] * 6 + [0], [3] * 6 + [4] * 6 + [0]], np.int32)
X = np.random.default_rng(0).standard_normal((2, 13, E)).astype(np.float32)


def make(**changes):
    model = models.from_config(BASE | changes)
    inputs = jnp.zeros(IDS.shape, jnp.int32) if changes.get("vocab_size") else jnp.zeros(X.shape)
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), inputs, IDS))
    keys = iter(jax.random.split(jax.random.key(1), 200))

    def drawn(leaf):  # what starts at 0 would hide the rest
        return leaf + 0.1 * jax.random.normal(next(keys), leaf.shape, leaf.dtype)

    return model, variables | {"params": jax.tree.map(drawn, variables["params"])}


def test_a_packed_document_equals_itself_alone():
    """With positions of both kinds, and a causal mixer among the others."""
    model, variables = make(
        pattern="linear_attention(num_heads=2, position_conv=3) + full_attention(rope_base=10.0)",
        position_embedding="per_token",
    )
    logits_BTW = jax.jit(model.apply)(variables, X, IDS)
    assert logits_BTW.shape == (2, 13, 3) and logits_BTW.dtype == jnp.float32
    documents = np.concatenate([X[:, :6], X[:, 6:12]])
    alone_BTW = jax.jit(model.apply)(variables, documents)
    packed_BTW = np.concatenate([logits_BTW[:, :6], logits_BTW[:, 6:12]])
    np.testing.assert_allclose(packed_BTW, alone_BTW, atol=2e-5)
    # Pooled over the document: the logits of all its tokens are the same, and not another's.
    np.testing.assert_allclose(alone_BTW, np.broadcast_to(alone_BTW[:, :1], (4, 6, 3)), atol=1e-6)
    assert np.abs(alone_BTW[0] - alone_BTW[1]).max() > 1e-2


def test_mean_pooling_is_the_mean_of_normed_tokens():
    changes = {"num_layers": 1, "pattern": "linear_attention(num_heads=2)"}
    per_token, variables = make(**changes, pooling="token")
    mean = models.from_config(BASE | changes)
    logits_BTW, pooled_BTW = (jax.jit(m.apply)(variables, X, IDS) for m in (per_token, mean))
    assert jnp.abs(logits_BTW[:, 0] - logits_BTW[:, 1]).max() > 1e-2
    # The output layer is affine, so that it commutes with the mean.
    expected_BW = logits_BTW[:, 6:12].mean(axis=1)
    np.testing.assert_allclose(pooled_BTW[:, 6], expected_BW, atol=1e-5)


def test_coordinates_place_tokens_anywhere():
    """Tokens in another order with their coordinates have the same logits, each its own."""
    model, variables = make(num_layers=1, position_embedding="per_token", pooling="token",
                            pattern="full_attention(rope_base=10.0)")  # fmt: skip
    order = np.random.default_rng(1).permutation(6)
    place = np.stack(np.unravel_index(np.arange(6), GRID), axis=-1).astype(np.int32)
    x_BTE, place_BTA = X[:, :6], np.broadcast_to(place, (2, 6, 2))
    logits_BTW = jax.jit(model.apply)(variables, x_BTE)
    moved_BTW = jax.jit(model.apply)(variables, x_BTE[:, order], None, place_BTA[:, order])
    np.testing.assert_allclose(moved_BTW, logits_BTW[:, order], atol=1e-5)


class Neighbours(nn.Module):
    """A channel mixer that sees segment ids and the grid: the document's first token is added."""

    grid: tuple[int, ...] | None = None
    uses_tokens = True

    def __call__(self, x_BTD, segment_ids_BT):
        assert self.grid == GRID
        first_BT = jnp.argmax(segment_ids_BT[:, :, None] == segment_ids_BT[:, None], axis=-1)
        return jnp.take_along_axis(x_BTD, first_BT[..., None], axis=1)


def test_grids_and_segment_ids_reach_channel_mixers(monkeypatch):
    made = channel_mixers.make

    def make_channel_mixer(text, *, grid=None, **keywords):
        if text == "neighbours":
            return Neighbours(grid, name=keywords.get("name"), parent=nn.module._unspecified_parent)
        return made(text, grid=grid, **keywords)

    monkeypatch.setattr(channel_mixers, "make", make_channel_mixer)
    spec = MixerSpec("linear_attention", (("channel_mixer", "neighbours"),))
    model = Encoder(D, (spec,), 3, grid=GRID, input_dim=E, pooling="token")
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), X, IDS)
    assert logits.shape == (2, 13, 3)
    with pytest.raises(ValueError, match="channel mixer neighbours sees a token's neighbours"):
        LanguageModel(7, D, (spec,))


def test_outputs_of_all_layers_can_be_captured_under_scan():
    model, variables = make()
    assert model.plan.repeats == 2
    _, seen = jax.eval_shape(
        lambda v: model.apply(
            v, X, IDS, mutable=["intermediates"],
            capture_intermediates=lambda m, name: isinstance(m, blocks.Block) and name == "__call__",
        ),
        variables,
    )  # fmt: skip
    for block in seen["intermediates"]["blocks"].values():
        ((x_NBTD, _),) = block["__call__"]
        assert x_NBTD.shape == (2, *X.shape[:2], D)


@pytest.mark.parametrize(
    "norm", [pytest.param("rep_bn", marks=pytest.mark.slow), "prepbn(steps=2)"]
)
def test_folding_a_batch_norm_changes_no_logit(norm):
    model, variables = make(
        norm=norm, channel_mixer="gelu", channel_bias=True, position_embedding="per_token",
        pattern="slab(num_heads=2)", num_layers=3,
    )  # fmt: skip
    for _ in range(3):  # statistics that are not those of the start
        _, seen = jax.jit(lambda v: model.apply(v, X, IDS, mutable=[norms.STATISTICS]))(variables)
        variables = variables | seen
    small, folded = folding.fold(model, variables)
    assert set(folded) == {"params"} and not [k for k in folded["params"] if "norm" in k]
    expected_BTW = jax.jit(model.apply)(variables, X, IDS)
    actual_BTW = jax.jit(small.apply)(folded, X, IDS)
    largest = jnp.abs(expected_BTW).max()
    np.testing.assert_allclose(actual_BTW, expected_BTW, atol=1e-5 * largest)
    assert largest > 0.1


def test_what_cannot_be_folded_is_refused():
    for changes, message in (
        ({"norm": "layer_norm"}, "'layer_norm' .* cannot be folded; it takes batch_norm, rep_bn"),
        ({"norm": "rep_bn"}, "block_0/channel_mixer/gate has no bias.* channel_bias=True"),
    ):
        model = models.from_config(BASE | changes | {"pattern": "slab", "num_layers": 1})
        variables = jax.eval_shape(model.init, jax.random.key(0), X, IDS)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.meta.unbox(variables))
        with pytest.raises(ValueError, match=message):
            folding.fold(model, zeros)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "decoder"},
            "architecture is 'decoder'; choose one of language_model, en",
        ),
        (
            {"tied_embeddings": False},
            "tied_embeddings is False, and the architecture 'encoder' has",
        ),
        (
            {"objective": "noise"},
            "objective is 'noise', and the architecture 'encoder' has no such",
        ),
        ({"depth": 3}, "no field 'depth'; it has .*pooling"),
        ({"num_classes": 0}, "num_classes is 0; it must be at least 1"),
        ({"pooling": "max"}, "pooling is 'max'; choose one of mean, token"),
        ({"position_embedding": "2d"}, "position_embedding is '2d'; choose one of none, per_axis"),
        ({"grid": 8}, "grid is 8; expected a tuple of integers or None"),
        ({"norm": "prepbn(step=3)"}, "norm 'prepbn' has no option 'step'; it has momentum, steps"),
        ({"norm": "prepbn(steps='3')"}, "steps of norm prepbn is '3'; expected an integer"),
        ({"architecture": "denoiser", "learn_variance": True}, "needs objective 'noise'"),
        ({"architecture": "denoiser", "norm_position": "post"}, "norm_position is 'post'"),
        ({"architecture": "language_model"}, "num_classes is 3, and the architecture 'language_m"),
    ],
)
def test_a_wrong_choice_lists_the_right_ones(changes, message):
    with pytest.raises(ValueError, match=message):
        models.from_config(BASE | changes)


def test_fields_of_other_architectures_at_their_defaults_are_nothing():
    everything = {name: default for name, (_, default) in models.config_fields().items()}
    assert models.from_config(everything | BASE) == models.from_config(BASE)
    own = {"pattern": "gla", "num_layers": 2, "d_model": 32, "vocab_size": 9}
    plain = language_model.from_config(own)
    assert language_model.from_config(everything | own) == plain
    with pytest.raises(
        ValueError, match="architecture is 'encoder', and what is asked for needs a"
    ):
        language_model.from_config(BASE)


def test_a_grid_that_does_not_fit_the_rows():
    model, variables = make()
    with pytest.raises(ValueError, match=r"Encoder: grid \(2, 3\) has 6 tokens, but a row has 13"):
        model.apply(variables, X)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "full_attention"}, "full_attention sees whole documents, and a language model"),
        ({"options": (("position_conv", 3),)}, "position_conv of gla sees a token's neighbours"),
        ({"norm": "prepbn(steps=3)"}, "norm is 'prepbn.steps=3.', whose statistics are of whole"),
    ],
)
def test_a_language_model_refuses_what_sees_later_tokens_however_it_is_made(fields, message):
    spec = MixerSpec(fields.pop("name", "gla"), fields.pop("options", ()))
    with pytest.raises(ValueError, match=message):
        LanguageModel(9, 32, (spec,), **fields)
    options = ", ".join(f"{k}={v}" for k, v in spec.options)
    config = {"pattern": f"{spec.name}({options})", "num_layers": 1, "d_model": 32, "vocab_size": 9}
    with pytest.raises(ValueError, match=message):
        language_model.from_config(config | fields)
    assert mixers.mixer_class("gla").causal
