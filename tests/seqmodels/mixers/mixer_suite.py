"""The checks that `test_mixers.py` runs over the registry: what every mixer must do.

A registered mixer is tested with no further line. `SMALL_OPTIONS` is for those whose defaults are
too large for the suite's width, or that have forms worth a run of their own. The checks of mixers
with `causal = False` are in `document_suite.py`, that of layers under a scan in `layer_suite.py`.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqmodels import mixers
from seqmodels.modules import blocks, norms

# name: option sets. The first goes through every check, the others through those of `consistency`
# and `gradients`. A mixer that is not here runs with its defaults.
SMALL_OPTIONS: dict[str, tuple[dict, ...]] = {
    "attention": (
        {"max_length": 32, "num_kv_heads": 2},
        {"window": 5, "num_kv_heads": 1, "qk_norm": True},
    ),
    "bidirectional": ({"mixer": "gla(num_heads=2)"}, {"shared": True, "combine": "mean"}),
    "delta_net": ({}, {"allow_neg_eigval": True, "use_gate": True}),
    "delta_product": ({}, {"num_householder": 3, "use_forget_gate": True, "conv_width": 2}),
    "full_attention": ({"num_kv_heads": 2}, {"num_kv_heads": 1, "qk_norm": True, "rope_base": 9.0}),
    "gated_delta_net": ({"num_heads": 2, "num_v_heads": 4}, {"allow_neg_eigval": True}),
    "mamba": ({"d_state": 4}, {"d_state": 3, "negative_eigenvalues": True}),
    "mamba2": ({"head_dim": 16, "d_state": 8, "num_groups": 2},),
    "lru": ({"d_state": 24, "r_min": 0.8},),
    "inline": ({}, {"grid": (2, 3), "num_heads": 2}),
    "linfusion": ({}, {"correction": "none"}),
    "mala": ({}, {"grid": (2, 5)}),
    "nalaformer": ({}, {"grid": (2, 3)}),
    "rala": ({}, {"grid": (2, 3), "weigh_keys": False}),
    "sana_video": ({}, {"grid": (2, 2, 2), "num_heads": 2, "block_size": 4}),
    "slab": ({}, {"grid": (3, 3)}),
    "hgrn2": ({"expand_ratio": 8},),
    "lightnet_nd": ({"gate_rank": 8, "grid": (2, 5)}, {"rope_base": None}),
    "linear_attention": (
        {"output_norm": "rms_norm"},
        {"q_map": "hedgehog_softmax", "features": 4, "rope_base": 100.0, "eps": 1e-12},
    ),
    "lawcat": ({"num_kv_heads": 2, "features": 4}, {"conv_width": None, "gate_rank": None}),
    "liger": (
        {"window": 5, "num_kv_heads": 2},
        {"window": 3, "gate": "hgrn2", "num_kv_heads": 1},
        {"window": None, "gate": "scalar", "gate_source": "projection", "feature_map": "t2r"},
    ),
    "lolcats": (
        {"window": 5, "num_kv_heads": 2, "features": 4},
        {"window": 3, "num_kv_heads": 1, "feature_map": "elu_plus_one"},
        {"window": None, "num_kv_heads": 2},
    ),
    "lion": (
        {"mixer": "hgrn", "group": 4, "window": 3},
        {"mixer": "gla(num_heads=2)", "group": 4, "window": 2, "grid": (2, 5), "depth": 2},
    ),
    "mate": (
        {"mixer": "hgrn", "review": 3, "window": (3,)},
        {"mixer": "gla(num_heads=2)", "review": 2, "window": (4, 2, 2), "grid": (2, 2, 2)},
    ),
    "mlp_mixer": ({"max_length": 20}, {"grid": (2, 4)}),
    "mlp_mixer_causal": ({"max_length": 24},),
    "mmmamba": ({"num_kv_heads": 2}, {"seed": "scratch", "conv_width": 3}),
    "selective": ({"max_length": 32, "num_kv_heads": 2, "mix_init": 0.4},),
    "mlstm": ({"input_gate_bias": 0.0}, {"input_gate": "sigmoid", "normalize": False}),
    "ordered": (
        {"mixer": "bidirectional(mixer='hgrn')", "order": "zigzag", "grid": (2, 5)},
        {
            "mixer": "bidirectional(mixer='gla(num_heads=2)')",
            "order": "hilbert",
            "grid": (3, 3),
            "group": 4,
        },
        {"mixer": "bidirectional", "order": "reverse", "group": 7},
    ),
    "shallow_ffn": ({"max_length": 20, "size": "m"}, {"grid": (4, 2), "num_heads": 2}),
    "shallow_ffn_causal": ({"max_length": 12, "size": "m"}, {"max_length": 24, "num_heads": 2}),
    "sparse_linear": (
        {"block_size": 8, "topk": 0.5, "num_heads": 2},
        {"block_size": 4, "topk": 0.5, "grid": (4, 2), "feature_map": "elu_plus_one"},
        {"mode": "sparse_only", "block_size": 3},
        {"mode": "linear_only"},
    ),
    "sparse_mlp": ({"max_length": 20, "num_experts": 3}, {"grid": (2, 4), "capacity_factor": 1.0}),
    "sparse_mlp_causal": ({"max_length": 24, "num_experts": 3},),
    "transnormer": ({"lrpe": True},),
    "transnormer_llm": ({"slopes": "alibi", "lrpe": True, "gate_activation": "sigmoid"},),
    "transnormer_local": ({"block_size": 16}, {"block_size": 4, "variant": "t1"}),
}

# Mixers whose `implementation` names no recurrent form.
ONE_FORM = (
    *("attention", "transnormer_local", "mlp_mixer", "shallow_ffn", "shallow_ffn_causal"),
    *("sparse_linear", "sparse_mlp"),
)

B, T, D, LAYERS = 4, 20, 32, 2
# Each row holds documents of these lengths: 1, and around a convolution's width. The last one holds
# the last PIECES[1] tokens, so that the second piece needs no segment ids.
DOCUMENT_LENGTHS = ([20], [9, 11], [1, 2, 5, 12], [4, 1, 1, 14])
PIECES = (9, 11)
MORE = 3  # tokens fed after the end, to see what a state does
ERROR_FLOAT32 = 1e-4
ERROR_BFLOAT16 = 5e-2
TRAIN_STEPS = 80


@dataclasses.dataclass(frozen=True)
class Case:
    """A test case: a mixer with one of its option sets, number `variant` in SMALL_OPTIONS."""

    name: str
    variant: int = 0

    def __str__(self):
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def make(self, **keywords) -> mixers.Mixer:
        """Returns the mixer; variants above 0 take the recurrent form, which compiles fastest."""
        options = SMALL_OPTIONS.get(self.name, ({},))[self.variant]
        if self.variant and self.name not in ONE_FORM:
            keywords.setdefault("implementation", "reference")
        return mixers.make(self.name, d_model=D, **options, **keywords)

    def layer(self, index=1) -> mixers.Layer:
        bound_LD = None
        if width := self.make().lower_bound_width():
            bound_LD = jnp.linspace(0.0, 0.6, LAYERS * width).reshape(LAYERS, width)
        return mixers.Layer(index, LAYERS, None if bound_LD is None else bound_LD[index])


def first_cases(causal: bool | None = None) -> list[Case]:
    """Returns a case for each mixer; causal: only those whose class has this flag."""
    return [case for case in all_cases(causal) if case.variant == 0]


def all_cases(causal: bool | None = None) -> list[Case]:
    """Returns a case for each option set of each mixer; causal: as in `first_cases`."""
    kinds = {name: mixers.mixer_class(name).causal for name in mixers.names()}
    found = [name for name, kind in kinds.items() if causal in (None, kind)]
    return [Case(n, i) for n in found for i in range(len(SMALL_OPTIONS.get(n, ({},))))]


def _initialised(case: Case):
    init = functools.partial(case.make().init, layer=case.layer())
    x_BTD = jnp.zeros((1, document_length(case) or 2, D))
    return nn.unbox(jax.jit(init)(jax.random.key(0), x_BTD))["params"]


def document_length(case: Case) -> int | None:
    """Returns the number of tokens of each document on the mixer's grid; None is any number."""
    grid = getattr(case.make(), "grid", None)
    return None if grid is None else math.prod(grid)


initial_params = functools.cache(_initialised)


def random_params(case: Case, seed=0):
    """Returns a mixer's initial values plus noise, so that those that start at 0 or 1 count too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(p.dtype), initial_params(case)
    )


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def segment_ids(case: Case | None = None):
    """Returns the ids (B, T) of DOCUMENT_LENGTHS, or of documents that fit the mixer's grid.

    Tokens that are left over are padding, id 0.
    """
    length = case and document_length(case)
    if length is not None:
        row = np.repeat(np.arange(1, T // length + 1), length)
        return jnp.tile(jnp.asarray(np.pad(row, (0, T % length)), jnp.int32), (B, 1))
    rows = [np.repeat(np.arange(1, len(n) + 1), n) for n in DOCUMENT_LENGTHS]
    return jnp.asarray(np.stack(rows), jnp.int32)


def error(actual, expected) -> float:
    """Returns the largest absolute difference of two arrays, relative to the rms of `expected`."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    actual, expected = (x.astype(np.complex128) for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.size:
        return 0.0
    scale = np.sqrt(np.mean(np.abs(expected) ** 2))
    return float(np.max(np.abs(actual - expected)) / max(scale, 1e-6))


def assert_close(actual, expected, limit, label):
    """Asserts that each leaf's `error` is below `limit`; `label` opens the message."""
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, b), a in zip(paths, jax.tree.leaves(actual), strict=True):
        found = error(a, b)
        assert found < limit, f"{label}{jax.tree_util.keystr(path)}: {found:.1e}"


def check_consistency(case: Case):
    """Checks that a mixer gives the same results packed, in pieces and token by token.

    The truth is one token at a time with no segment ids, the state cleared where a document begins.
    bfloat16 is compared, too.
    """
    mixer, layer, segment_ids_BT = case.make(), case.layer(), segment_ids()
    start_BT = np.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1]) != 0
    empty = mixer.init_state(B)
    # What the steps read: the sequence, more of it, and that again after each of the other two
    # states.
    time = np.concatenate([np.arange(T)] + 3 * [np.arange(T, T + MORE)])
    after_packed, after_pieces = T + MORE, T + 2 * MORE

    @jax.jit
    def run(params, x_BTD):
        apply = functools.partial(mixer.apply, {"params": params}, layer=layer)
        packed, packed_state = apply(x_BTD[:, :T], segment_ids_BT)
        first, state = apply(x_BTD[:, : PIECES[0]], segment_ids_BT[:, : PIECES[0]], empty)
        begins_B = start_BT[:, PIECES[0]]
        second, pieces_state = apply(
            x_BTD[:, PIECES[0] : T], None, blocks.clear_rows(state, empty, begins_B)
        )
        pieces = jnp.concatenate([first, second], axis=1)

        def step(state, inputs):
            index, x_BD, start_B = inputs
            state = blocks.clear_rows(state, empty, start_B)
            for restart, other in ((after_packed, packed_state), (after_pieces, pieces_state)):
                state = jax.tree.map(
                    lambda a, b, i=restart: jnp.where(index == i, b, a), state, other
                )
            y_B1D, state = apply(x_BD[:, None], None, state)
            return state, (y_B1D[:, 0], state)

        start_TB = np.pad(start_BT.T, ((0, 3 * MORE), (0, 0)))
        inputs = (np.arange(len(time)), jnp.moveaxis(x_BTD, 1, 0)[time], start_TB)
        _, (y_TBD, states) = jax.lax.scan(step, empty, inputs)
        steps_state = jax.tree.map(lambda leaf: leaf[T - 1], states)
        low, _ = case.make(dtype=jnp.bfloat16).apply({"params": params}, x_BTD[:, :T], layer=layer)
        states = (packed_state, pieces_state, steps_state)
        return packed, pieces, jnp.moveaxis(y_TBD, 0, 1), states, low

    x_BTD = normal(B, T + MORE, D, seed=1)
    packed, pieces, steps, states, low = run(random_params(case), x_BTD)
    assert_close(packed, steps[:, :T], ERROR_FLOAT32, "packed, against separate steps")
    assert_close(pieces, steps[:, :T], ERROR_FLOAT32, "in pieces, against separate steps")
    more, after_packed, after_pieces = np.split(np.asarray(steps[:, T:]), 3, axis=1)
    assert_close(after_packed, more, ERROR_FLOAT32, "after the packed sequence")
    assert_close(after_pieces, more, ERROR_FLOAT32, "after the pieces")
    # In a row of one document nothing is stale, so that the states themselves are equal.
    packed_state, pieces_state, steps_state = jax.tree.map(lambda s: s[:1] if s.ndim else s, states)
    assert_close(packed_state, steps_state, ERROR_FLOAT32, "state")
    assert_close(pieces_state, steps_state, ERROR_FLOAT32, "state after pieces")
    assert low.dtype == jnp.bfloat16
    difference = np.asarray(low[0], np.float32) - packed[0]
    rms = np.sqrt(np.mean(np.square(difference)) / np.mean(np.square(packed[0])))
    assert rms < ERROR_BFLOAT16, f"bfloat16: {rms:.1e}"


class Recall(nn.Module):
    """Model for the tests: a mixer with a residual connection, and a classifier of four classes."""

    case: Case

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT):
        mixer = self.case.make(name="mixer")
        y_BTD, _ = mixer(x_BTD, segment_ids_BT, layer=self.case.layer())
        return y_BTD, nn.Dense(4, name="classes")(norms.srms_norm(x_BTD + y_BTD))


@functools.cache
def training_step(case: Case):
    """Returns (step, start): a training step of the mixer in a Recall model, and its first values.

    step: (params, Adam's state, *batch) -> new ones, loss, gradients of params and x. One program
      serves two checks: the loss is cross entropy where mask_BT, plus y . cotangent_BTD.
    start: the mixer's params -> (params, Adam's state).
    """
    model, optimizer = Recall(case), optax.adam(2e-2)
    rng = np.random.default_rng(0)
    classes = {
        "kernel": rng.standard_normal((D, 4)).astype(np.float32) / D,
        "bias": np.zeros(4, np.float32),
    }

    def loss(params, x_BTD, segment_ids_BT, label_BT, mask_BT, cotangent_BTD):
        y_BTD, logits_BTW = model.apply({"params": params}, x_BTD, segment_ids_BT)
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTW, label_BT)
        mean = jnp.sum(losses_BT * mask_BT) / jnp.maximum(jnp.sum(mask_BT), 1.0)
        return mean + jnp.sum(y_BTD * cotangent_BTD)

    @jax.jit
    def step(params, opt_state, *batch):
        value, (params_bar, x_bar) = jax.value_and_grad(loss, (0, 1))(params, *batch)
        updates, opt_state = optimizer.update(params_bar, opt_state)
        return optax.apply_updates(params, updates), opt_state, value, params_bar, x_bar

    def start(mixer_params):
        params = jax.tree.map(jnp.asarray, {"mixer": mixer_params, "classes": classes})
        return params, optimizer.init(params)

    return step, start


def check_gradients(case: Case):
    """Checks that gradients are finite, and 0 at later tokens and at those of other documents."""
    segment_ids_BT = segment_ids()
    found_BT, same_BT, t = found_gradients(case, segment_ids_BT)
    seen_BT = same_BT & (np.arange(T) <= t)[None]
    assert not np.any(found_BT & ~seen_BT), "a later token or another document is seen"
    assert found_BT[0, t - 1], "an earlier token is not seen"


def found_gradients(case: Case, segment_ids_BT):
    """Checks that gradients are finite and reach every parameter; returns what one token sees.

    Returns booleans (2 B, T), where the output of token t has a gradient and which tokens are of
    its document, and t. The last B rows have extreme inputs.
    """
    step, start = training_step(case)
    segment_ids_BT, t = jnp.tile(segment_ids_BT, (2, 1)), 14
    x_BTD = jnp.tile(normal(B, T, D, seed=1), (2, 1, 1)).at[B:].multiply(30.0)
    one_token = jnp.zeros((2 * B, T, D)).at[:, t].set(normal(2 * B, D, seed=3))
    labels = jnp.zeros((2 * B, T), jnp.int32), jnp.zeros((2 * B, T))
    params, opt_state = start(random_params(case))

    def gradients(cotangent_BTD):
        batch = x_BTD, segment_ids_BT, *labels, cotangent_BTD
        return step(params, opt_state, *batch)[3:]

    params_bar, x_bar = gradients(normal(2 * B, T, D, seed=4))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params_bar["mixer"]):
        assert np.isfinite(leaf).all(), f"gradient of {jax.tree_util.keystr(path)}"
        assert np.any(leaf), f"no gradient reaches {jax.tree_util.keystr(path)}"
    assert np.isfinite(x_bar).all(), "gradient of x"
    _, x_bar = gradients(one_token)
    found_BT = np.abs(x_bar).max(axis=-1) > 0
    # An extreme input may saturate a softmax at another token.
    assert found_BT[:B, t].all(), "a token does not see itself"
    return found_BT, np.asarray(segment_ids_BT == segment_ids_BT[:, t : t + 1]), t


def check_trains(case: Case):
    """Checks that one layer of a mixer learns to remember.

    One token of a sequence is a value (0-3) and the others are blank (4); every token after it must
    name it. The loss leaves log 4 = 1.39 and ends under half of it. Without an order in time every
    fifth token is the value, since means over a document see it so much better, and all name it.
    """
    causal = mixers.mixer_class(case.name).causal
    step, start = training_step(case)
    rng, rows = np.random.default_rng(0), 2 * B
    embedding_WD = rng.standard_normal((5, D)).astype(np.float32)
    params, opt_state = start(initial_params(case))
    ones_BT, zeros_BTD = np.ones((rows, T), np.int32), np.zeros((rows, T, D), np.float32)
    losses = []
    for _ in range(TRAIN_STEPS):
        tokens_BT = np.full((rows, T), 4)
        place_B, value_B = rng.integers(0, T // 2, rows), rng.integers(0, 4, rows)
        if causal:
            tokens_BT[np.arange(rows), place_B] = value_B
            mask_BT = np.arange(T) > place_B[:, None]
        else:
            is_value_BT = (np.arange(T) + place_B[:, None]) % 5 == 0
            tokens_BT, mask_BT = np.where(is_value_BT, value_B[:, None], 4), ~is_value_BT
        label_BT = value_B[:, None].astype(np.int32) * ones_BT
        batch = embedding_WD[tokens_BT], ones_BT, label_BT, mask_BT.astype(np.float32), zeros_BTD
        params, opt_state, loss, *_ = step(params, opt_state, *batch)
        losses.append(loss)
    start_loss, end_loss = np.mean(losses[:3]), np.mean(losses[-8:])
    assert start_loss > 1.0, f"already low at the start: {start_loss}"
    assert end_loss < 0.69, f"loss went from {start_loss:.2f} to {end_loss:.2f}"


def check_state(case: Case):
    """Checks that `init_state` gives the shapes and dtypes of every state returned, for any T."""
    params = jax.eval_shape(lambda: _initialised(case))
    for dtype in (jnp.float32, jnp.bfloat16):
        mixer = case.make(dtype=dtype)

        def apply(params, *arguments, mixer=mixer):
            return mixer.apply({"params": params}, *arguments, layer=case.layer())

        empty = jax.eval_shape(lambda mixer=mixer: mixer.init_state(B))
        describe = functools.partial(jax.tree.map, lambda s: (s.shape, s.dtype))
        for length in (1, T):
            x_BTD = jax.ShapeDtypeStruct((B, length, D), dtype)
            _, first = jax.eval_shape(apply, params, x_BTD)
            _, next = jax.eval_shape(apply, params, x_BTD, None, empty)
            assert describe(first) == describe(empty), f"T = {length}, {dtype.__name__}"
            assert describe(next) == describe(empty), f"T = {length}, {dtype.__name__}"
