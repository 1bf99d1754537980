"""The whole stack: pieces equal the whole, scanned equals unrolled, layouts do what they say."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import language_model, mixers
from seqmodels.modules import pattern
from tests.seqmodels.mixers import mixer_suite

PATTERN = "rg_lru + attention(window=5)"
BASE = {"vocab_size": 61, "d_model": 32, "num_layers": 5, "pattern": PATTERN}
SEGMENTS = np.array([[1] * 5 + [2] * 9 + [3] * 2, [4] * 16, [5] * 12 + [0] * 4], np.int32)


def make(**changes):
    model = language_model.from_config(BASE | changes)
    tokens_BT = jax.random.randint(jax.random.key(0), SEGMENTS.shape, 0, 61)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), tokens_BT)["params"])
    return model, params, tokens_BT


def unstack(params, period, repeats):
    """Returns the parameters of a scanned stack as those of the same stack unrolled."""
    unrolled = {k: v for k, v in params.items() if k != "blocks"}
    for n in range(repeats):
        for i in range(period):
            block = jax.tree.map(lambda x, n=n: x[n], params["blocks"][f"block_{i}"])
            unrolled[f"block_{n * period + i}"] = block
    return unrolled


LEARNED = {"pattern": "attention(window=5, rope_base=None)", "learned_positions": 16}


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.slow), LEARNED],
    ids=["rotary", "learned positions"],
)
def test_any_pieces_of_packed_documents_equal_the_whole(changes):
    model, params, tokens_BT = make(**changes)

    @jax.jit
    def whole_and_pieces(params):
        whole_BTW, none = model.apply({"params": params}, tokens_BT, SEGMENTS)
        assert none is None
        state = model.init_state(len(tokens_BT))
        pieces = []
        for piece in (slice(0, 3), slice(3, 4), slice(4, 14), slice(14, 16)):
            logits, state = model.apply(
                {"params": params}, tokens_BT[:, piece], SEGMENTS[:, piece], state
            )
            pieces.append(logits)
        return whole_BTW, jnp.concatenate(pieces, axis=1)

    whole_BTW, pieces_BTW = whole_and_pieces(params)
    np.testing.assert_allclose(pieces_BTW, whole_BTW, atol=3e-5)


def test_a_packed_document_equals_itself_alone():
    model, params, tokens_BT = make()
    logits_BTW = jax.jit(model.apply)({"params": params}, tokens_BT, SEGMENTS)[0]
    alone_BTW = jax.jit(model.apply)({"params": params}, tokens_BT[:1, 5:14])[0]
    np.testing.assert_allclose(logits_BTW[:1, 5:14], alone_BTW, atol=3e-5)


def test_more_tokens_than_learned_positions():
    model, params, _ = make(**LEARNED, num_layers=1)
    tokens_BT = jnp.zeros((1, 17), jnp.int32)
    for segment_ids_BT in (None, jnp.ones_like(tokens_BT)):
        with pytest.raises(ValueError, match="17 tokens, and the model has learned 16 positions"):
            jax.eval_shape(model.apply, {"params": params}, tokens_BT, segment_ids_BT)


def test_a_state_that_has_read_more_than_the_learned_positions_leave():
    model, params, tokens_BT = make(**LEARNED, num_layers=1)
    ones_BT = jnp.ones((len(tokens_BT), 2), jnp.int32)
    state = model.init_state(len(tokens_BT)).replace(
        segment_id_B=ones_BT[:, 0], next_position_B=15 * ones_BT[:, 0]
    )
    for segment_ids_BT in (None, ones_BT):
        with pytest.raises(ValueError, match="comes to 17 tokens, and .* learned 16 positions"):
            model.apply({"params": params}, tokens_BT[:, :2], segment_ids_BT, state)
    logits_BTW, after = model.apply({"params": params}, tokens_BT[:, :2], 2 * ones_BT, state)
    assert jnp.isfinite(logits_BTW).all() and (after.next_position_B == 2).all()


@pytest.mark.slow
def test_scan_over_layers_and_remat_change_nothing():
    """Runs in float64, where rounding neither fails nor hides anything.

    HGRN is in the pattern because it asks how deep in the stack it is.
    """
    pattern = {"pattern": "hgrn + attention(window=5)"}
    model, params, tokens_BT = make(**pattern)
    plan = model.plan
    assert (len(plan.period), plan.repeats, len(plan.suffix)) == (2, 2, 1)
    wide = pattern | {"dtype": "float64", "param_dtype": "float64"}

    def loss_and_grad(params, **changes):
        model = language_model.from_config(BASE | wide | changes)

        def loss(params):
            return jnp.mean(jnp.square(model.apply({"params": params}, tokens_BT, SEGMENTS)[0]))

        return jax.jit(jax.value_and_grad(loss))(params)

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        want = loss_and_grad(params)
        assert_same_tree(loss_and_grad(params, remat="full"), want)
        flat = loss_and_grad(unstack(params, 2, 2), scan_layers=False, remat="operators")
        assert_same_tree(flat, (want[0], unstack(want[1], 2, 2)))


def assert_same_tree(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for got_leaf, want_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        atol = 1e-6 * float(jnp.abs(want_leaf).max())
        np.testing.assert_allclose(got_leaf, want_leaf, atol=atol)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_position": "post", "norm": "layer_norm"},
        {"norm_position": "sandwich", "channel_mixer": "sglu", "norm": "srms_norm"},
        {"channel_mixer": None, "tied_embeddings": False},
        {"channel_mixer": "gelu", "d_ff": 48, "logit_softcap": 2.0},
    ],
)
def test_layouts(changes):
    model, params, tokens_BT = make(num_layers=1, **changes)
    logits_BTW, _ = jax.jit(model.apply)({"params": params}, tokens_BT)
    assert logits_BTW.dtype == jnp.float32
    assert np.isfinite(logits_BTW).all()
    block = params["block_0"]
    kind = changes.get("channel_mixer", "swiglu")
    assert ("channel_mixer" in block) == (kind is not None)
    assert ("gate" in block.get("channel_mixer", {})) == (kind in ("swiglu", "sglu"))
    assert ("output" in params) == (not changes.get("tied_embeddings", True))
    if "d_ff" in changes:
        assert block["channel_mixer"]["up"]["kernel"].shape == (32, 48)
    if cap := changes.get("logit_softcap"):
        assert np.abs(logits_BTW).max() < cap


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model, params, tokens_BT = make(dtype="bfloat16", num_layers=2)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits_BTW = jax.jit(model.apply)({"params": params}, tokens_BT)[0]
    full = language_model.from_config(BASE | {"num_layers": 2})
    full_BTW = jax.jit(full.apply)({"params": params}, tokens_BT)[0]
    assert logits_BTW.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean(jnp.square(logits_BTW - full_BTW)) / jnp.mean(jnp.square(full_BTW)))
    assert error < 2e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pattern": "gated_deltanet"},
            "unknown mixer 'gated_deltanet'; choose one of .*gated_delta_net",
        ),
        ({"pattern": "attention(heads=2)"}, "no option 'heads'; it has .*num_heads"),
        ({"pattern": "attention(num_heads=5)"}, "num_heads 5 must divide d_model 32"),
        ({"norm": "rmsnorm"}, "norm is 'rmsnorm'; choose one of .*rms_norm"),
        ({"channel_mixer": "swish"}, "channel_mixer is 'swish'; choose one of .*swiglu"),
        ({"remat": "all"}, "remat is 'all'; choose one of none, full, operators, dots"),
        ({"norm_position": "before"}, "choose one of pre, post, sandwich"),
        ({"depth": 3}, "no field 'depth'"),
        ({"d_ff": "64"}, "config.model.d_ff is '64'; expected an integer or None"),
        ({"d_ff": 0}, "config.model.d_ff is 0; it must be at least 1"),
        ({"vocab_size": 0}, "config.model.vocab_size is 0; it must be at least 1"),
        ({"logit_softcap": 0.0}, "config.model.logit_softcap is 0.0; it must be more than 0"),
        ({"norm_eps": True}, "config.model.norm_eps is True; expected a number"),
        ({"tied_embeddings": 1}, "config.model.tied_embeddings is 1; expected true or false"),
        ({"mixer_residual": (1, 2, 3)}, r"mixer_residual is .*; expected \(a number, a number\)"),
        ({"mixer_residual": (1, None)}, r"mixer_residual is .*; expected \(a number, a number\)"),
        (
            {"channel_mixer": "moe(num_experts='8')"},
            "num_experts of channel mixer moe is '8'; expect",
        ),
        (
            {"pattern": "attention(window='5')"},
            "window of attention is '5'; expected an integer or",
        ),
        ({"pattern": "gla(d_ff='wide')"}, "pattern: d_ff of gla is 'wide'; expected an integer or"),
        ({"pattern": "gla(mixer_residual=2)"}, "mixer_residual of gla is 2; expected .a number, a"),
        ({"pattern": None}, "config.model.pattern is None; expected text"),
        ({"dtype": "bf16"}, "dtype is 'bf16'; choose one of float32, bfloat16, float16, float64"),
        ({"param_dtype": jnp.int8}, "param_dtype is 'int8'; choose one of float32"),
        ({"dtype": "float64"}, "config.model.dtype is 'float64', which needs JAX_ENABLE_X64=1"),
    ],
)
def test_a_wrong_choice_lists_the_right_ones(changes, message):
    with pytest.raises(ValueError, match=message):
        language_model.from_config(BASE | changes)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_rows_of_the_state_of_every_mixer(scan_layers):
    """Rows are taken along each leaf's batch axis, the one that another batch size changes."""
    rows_N = np.array([2, 0, 0, 1])
    random = np.random.default_rng(0)
    for name in mixers.causal_names():
        for options in mixer_suite.SMALL_OPTIONS.get(name, ({},)):
            layer = pattern.MixerSpec(name, tuple(options.items()))
            fields = {"pattern": pattern.to_text([layer]), "num_layers": 2}
            model = language_model.from_config(BASE | fields | {"scan_layers": scan_layers})
            assert model.plan.repeats == 2 * scan_layers
            shapes, others = (
                jax.eval_shape(functools.partial(model.init_state, n)) for n in (3, 5)
            )
            state = jax.tree.map(lambda leaf: random.integers(0, 99, leaf.shape), shapes)
            taken = state.take_rows(rows_N)

            def check(leaf, found, shape, other, name=name):
                axes = [i for i, (a, b) in enumerate(zip(shape.shape, other.shape)) if a != b]
                expected = np.take(leaf, rows_N, axes[0]) if axes else leaf
                np.testing.assert_array_equal(found, expected, err_msg=name)

            jax.tree.map(check, state, taken, shapes, others)


def test_rows_of_a_state_go_on_as_before():
    """A row's continuation does not see what became of the others (jit, documents, positions)."""
    model, params, tokens_BT = make(**LEARNED, num_layers=2)
    rows_N = jnp.array([2, 0])

    @jax.jit
    def run(params):
        state = model.init_state(3)
        _, state = model.apply({"params": params}, tokens_BT[:, :9], SEGMENTS[:, :9], state)
        rest = tokens_BT[:, 9:12], SEGMENTS[:, 9:12]
        whole_BTW, _ = model.apply({"params": params}, *rest, state)
        some = (x[rows_N] for x in rest)
        some_BTW, _ = model.apply({"params": params}, *some, state.take_rows(rows_N))
        return whole_BTW[rows_N], some_BTW

    np.testing.assert_allclose(*run(params), atol=1e-5)


def test_a_float32_residual_keeps_small_steps():
    """A bfloat16 residual loses what blocks add below its spacing; Mamba's is float32 for that."""
    fields = {"pattern": "hgrn", "num_layers": 6, "embedding_scale": 60.0}
    model, params, tokens_BT = make(**fields)

    def logits(**changes):
        narrow = language_model.from_config(BASE | fields | changes)
        return jax.jit(narrow.apply)({"params": params}, tokens_BT)[0]

    exact = logits()
    plain, wide = (
        jnp.abs(logits(dtype="bfloat16", float32_residual=on) - exact).mean()
        for on in (False, True)
    )
    assert wide < 0.6 * plain


def test_fields_that_are_not_given_are_at_their_defaults():
    given = {name: BASE[name] for name in ("pattern", "num_layers", "vocab_size", "d_model")}
    whole = {name: default for name, (_, default) in language_model.config_fields().items()}
    model = language_model.from_config(given)
    assert model == language_model.from_config(whole | given)
    assert model == language_model.LanguageModel(
        model.vocab_size, model.d_model, model.mixers, dtype=model.dtype, param_dtype=model.dtype
    )
    lists = language_model.from_config(given | {"channel_residual": [1, 0.5], "dtype": "bfloat16"})
    assert (lists.channel_residual, lists.dtype) == ((1, 0.5), jnp.bfloat16)


def test_weights_of_residuals_of_the_stack_are_those_of_every_layer():
    """With the second weight 0 the logits are those of the embedded tokens, normed."""
    none = {"pattern": "attention", "mixer_residual": (2.0, 0.0), "channel_residual": (0.5, 0.0)}
    one, params, tokens_BT = make(**none, num_layers=1)
    own = {"num_layers": 1, "pattern": "attention(mixer_residual=(2.0, 0.0))"}
    for model in (one, language_model.from_config(BASE | none | own | {"mixer_residual": (1, 1)})):
        x_BTD = params["embed"]["embedding"][tokens_BT]
        scale_D = params["final_norm"]["scale"]
        x_BTD = x_BTD / jnp.sqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + 1e-5)
        expected_BTW = (x_BTD * scale_D[None, None]) @ params["embed"]["embedding"].T
        logits_BTW, _ = jax.jit(model.apply)({"params": params}, tokens_BT)
        np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-4)
