"""What every mixer must do, whatever its recurrence: the checks that `test_mixers.py` runs over the registry.

A registered mixer is tested with no further line. `SMALL_OPTIONS` is for those whose defaults are too large for
the suite's width, or that have forms worth a run of their own.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqmodels import blocks, mixers

# name: option sets. The first goes through every check, the others through those of `consistency` and
# `gradients`. A mixer that is not here runs with its defaults.
SMALL_OPTIONS: dict[str, tuple[dict, ...]] = {
    "attention": (
        {"max_length": 32, "num_kv_heads": 2},
        {"window": 5, "num_kv_heads": 1, "qk_norm": True},
    ),
    "delta_net": ({}, {"allow_neg_eigval": True, "use_gate": True}),
    "delta_product": ({}, {"num_householder": 3, "use_forget_gate": True, "conv_width": 2}),
    "gated_delta_net": ({"num_heads": 2, "num_v_heads": 4}, {"allow_neg_eigval": True}),
    "mamba": ({"d_state": 4}, {"d_state": 3, "negative_eigenvalues": True}),
    "mamba2": ({"head_dim": 16, "d_state": 8, "num_groups": 2},),
    "lru": ({"d_state": 24, "r_min": 0.8},),
    "hgrn2": ({"expand_ratio": 8},),
    "linear_attention": (
        {"output_norm": "rms_norm"},
        {"q_map": "hedgehog_softmax", "features": 4, "rope_base": 100.0, "eps": 1e-12},
        {"q_map": "silu", "k_map": "identity", "normalize": False, "output_norm": "rms_norm"},
    ),
    "mlstm": (
        {"input_gate_bias": 0.0},
        {"input_gate": "sigmoid"},
        {"input_gate": "sigmoid", "normalize": False, "gate_soft_cap": None},
    ),
    "transnormer": ({}, {"variant": "t1", "lrpe": True, "norm": "gated_rms_norm"}),
    "transnormer_llm": ({}, {"slopes": "alibi", "lrpe": True, "gate_activation": "sigmoid"}),
    "transnormer_local": ({"block_size": 16}, {"block_size": 4, "variant": "t1"}),
}

B, T, D, LAYERS = 2, 20, 32, 2
# Rows 0 and 1 hold one document, rows 2 and 3 several: lengths of 1 and around a convolution's width.
DOCUMENT_LENGTHS = ([20], [20], [1, 5, 3, 1, 10], [7, 1, 1, 11])
PIECES = (1, 8, 11)  # document boundaries fall inside them, and on one edge
MORE = 3  # tokens fed after the end, to see what a state does
ERROR_FLOAT32 = 1e-4
ERROR_BFLOAT16 = 5e-2
TRAIN_STEPS, TRAIN_BATCH, TRAIN_LENGTH = 60, 16, 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One mixer with one set of options."""

    name: str
    variant: int = 0

    def __str__(self):
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def make(self, **keywords) -> mixers.Mixer:
        options = SMALL_OPTIONS.get(self.name, ({},))[self.variant]
        return mixers.make(self.name, d_model=D, **options, **keywords)

    def lower_bound_LD(self):
        if not mixers.mixer_class(self.name).uses_lower_bound:
            return None
        width = self.make().lower_bound_width()
        return jnp.linspace(0.0, 0.6, LAYERS * width).reshape(LAYERS, width)

    def layer(self, index=1) -> mixers.Layer:
        bound_LD = self.lower_bound_LD()
        return mixers.Layer(index, LAYERS, None if bound_LD is None else bound_LD[index])


def first_cases() -> list[Case]:
    return [Case(name) for name in mixers.names()]


def all_cases() -> list[Case]:
    return [Case(n, i) for n in mixers.names() for i in range(len(SMALL_OPTIONS.get(n, ({},))))]


def random_params(case: Case, key=0):
    """Initial values plus noise, so that parameters that start at 0 or 1 count too."""
    x_BTD = jnp.zeros((1, 2, D))
    init = functools.partial(case.make().init, layer=case.layer())
    params = nn.unbox(jax.jit(init)(jax.random.key(key), x_BTD))["params"]
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(key)
    noisy = [p + 0.1 * rng.standard_normal(p.shape).astype(p.dtype) for p in leaves]
    return jax.tree.unflatten(treedef, noisy)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def segment_ids():
    rows = [np.repeat(np.arange(1, len(n) + 1), n) for n in DOCUMENT_LENGTHS]
    return jnp.asarray(np.stack(rows), jnp.int32)


def error(actual, expected) -> float:
    """The largest error, against the rms of what is expected."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    actual, expected = (x.astype(np.complex128) for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.size:
        return 0.0
    scale = np.sqrt(np.mean(np.abs(expected) ** 2))
    return float(np.max(np.abs(actual - expected)) / max(scale, 1e-6))


def assert_close(actual, expected, limit, label):
    """`error` of each leaf under `limit`."""
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, b), a in zip(paths, jax.tree.leaves(actual), strict=True):
        found = error(a, b)
        assert found < limit, f"{label}{jax.tree_util.keystr(path)}: {found:.1e}"


def check_consistency(case: Case):
    """Whole == pieces == step by step, packed == separate, None == one segment; bfloat16 close to float32."""
    mixer, layer = case.make(), case.layer()
    segment_ids_BT = segment_ids()
    start_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    empty = mixer.init_state(2 * B)
    more_BTD = normal(2 * B, MORE, D, seed=2)

    @jax.jit
    def run(params, x_BTD):
        apply = functools.partial(mixer.apply, {"params": params}, layer=layer)
        plain = apply(x_BTD)
        x_BTD = jnp.concatenate([x_BTD, x_BTD])
        packed = apply(x_BTD, segment_ids_BT)

        def step(state, inputs):
            x_B1D, start_B = inputs
            y_B1D, state = apply(x_B1D, None, blocks.clear_rows(state, empty, start_B))
            return state, y_B1D[:, 0]

        state, y_TBD = jax.lax.scan(
            step, empty, (jnp.moveaxis(x_BTD, 1, 0)[:, :, None], start_BT.T)
        )
        steps = jnp.moveaxis(y_TBD, 0, 1), state

        outputs, state, begin = [], empty, 0
        for length in PIECES:
            piece = slice(begin, begin + length)
            state = blocks.clear_rows(state, empty, start_BT[:, begin])
            y_BTD, state = apply(x_BTD[:, piece], segment_ids_BT[:, piece], state)
            outputs.append(y_BTD)
            begin += length
        pieces = jnp.concatenate(outputs, axis=1), state

        states = jax.tree.map(lambda *leaves: jnp.stack(leaves), packed[1], steps[1], pieces[1])
        more = jax.vmap(lambda state: apply(more_BTD, None, state)[0])(states)
        low = case.make(dtype=jnp.bfloat16).apply({"params": params}, x_BTD[:B], layer=layer)
        return plain, packed, steps, pieces, more, low

    plain, packed, steps, pieces, more, low = run(random_params(case), normal(B, T, D, seed=1))
    one_document = jax.tree.map(
        lambda leaf: leaf[:B] if leaf.ndim else leaf, (packed, steps, pieces)
    )
    for found, label in zip(one_document, ("one segment", "steps", "pieces")):
        assert_close(found, plain, ERROR_FLOAT32, label)
    assert_close(steps[0], packed[0], ERROR_FLOAT32, "packed, against separate steps")
    assert_close(pieces[0], packed[0], ERROR_FLOAT32, "packed, in pieces")
    assert_close(more[1], more[0], ERROR_FLOAT32, "after the end, from steps' state")
    assert_close(more[2], more[0], ERROR_FLOAT32, "after the end, from pieces' state")
    assert low[0].dtype == jnp.bfloat16
    rms = np.sqrt(np.mean(np.square(np.asarray(low[0], np.float32) - plain[0])))
    assert rms < ERROR_BFLOAT16 * np.sqrt(np.mean(np.square(plain[0]))), "bfloat16"


def check_gradients(case: Case):
    """Finite at ordinary and at extreme inputs; none from later tokens or other documents."""
    mixer, layer = case.make(), case.layer()
    segment_ids_BT, t = segment_ids(), 14
    x_BTD = normal(2 * B, T, D) * jnp.array([1.0, 30.0, 1.0, 30.0])[:, None, None]
    one_token = jnp.zeros((2 * B, T, D)).at[:, t].set(normal(2 * B, D, seed=3))
    cotangents = jnp.stack([one_token, normal(2 * B, T, D, seed=4)])

    @jax.jit
    def run(params, x_BTD):
        def apply(params, x_BTD):
            return mixer.apply({"params": params}, x_BTD, segment_ids_BT, layer=layer)

        (_, state), pull = jax.vjp(apply, params, x_BTD)
        zero = jax.tree.map(
            lambda s: (
                jnp.zeros(s.shape, s.dtype)
                if jnp.issubdtype(s.dtype, jnp.inexact)
                else np.zeros(s.shape, jax.dtypes.float0)
            ),
            state,
        )
        return jax.vmap(lambda y_bar: pull((y_bar, zero)))(cotangents)

    params_bar, x_bar = run(random_params(case), x_BTD)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params_bar):
        assert np.isfinite(leaf).all(), f"gradient of {jax.tree_util.keystr(path)}"
        assert np.any(leaf[1]), f"no gradient reaches {jax.tree_util.keystr(path)}"
    assert np.isfinite(x_bar).all(), "gradient of x"
    seen_BT = (segment_ids_BT == segment_ids_BT[:, t : t + 1]) & (jnp.arange(T) <= t)[None]
    found_BT = np.abs(x_bar[0]).max(axis=-1) > 0
    assert not np.any(found_BT & ~seen_BT), "a later token or another document is seen"
    assert found_BT[:, t].all() and found_BT[0, t - 1], "an earlier token is not seen"


def check_state(case: Case):
    """`init_state` is pure and has the structure, shapes and dtypes of every state returned, for any T."""
    for dtype in (jnp.float32, jnp.bfloat16):
        mixer = case.make(dtype=dtype)
        empty = jax.eval_shape(lambda mixer=mixer: mixer.init_state(B))

        def run(length, mixer=mixer, dtype=dtype):
            x_BTD = jnp.zeros((B, length, D), dtype)
            params = mixer.init(jax.random.key(0), x_BTD, layer=case.layer())
            state = mixer.init_state(B)
            _, first = mixer.apply(params, x_BTD, layer=case.layer())
            _, next = mixer.apply(params, x_BTD, None, state, layer=case.layer())
            return first, next

        for length in (1, 3, T):
            first, next = jax.eval_shape(functools.partial(run, length))
            describe = functools.partial(jax.tree.map, lambda s: (s.shape, s.dtype))
            assert describe(first) == describe(empty), f"T = {length}, {dtype.__name__}"
            assert describe(next) == describe(empty), f"T = {length}, {dtype.__name__}"


class Block(nn.Module):
    """x + mixer(norm(x)), the form that nn.scan takes."""

    case: Case

    @nn.compact
    def __call__(self, x_BTD, index, lower_bound_D):
        layer = mixers.Layer(index, LAYERS, lower_bound_D)
        y_BTD, state = self.case.make(name="mixer")(nn.RMSNorm(name="norm")(x_BTD), layer=layer)
        return x_BTD + y_BTD, state


def scanned_blocks(case: Case) -> nn.Module:
    return nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=LAYERS,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(case)


def check_layers(case: Case):
    """Under nn.scan over layers, with the layer's index traced: what the layers give one after the other."""
    stack, block = scanned_blocks(case), Block(case)
    bound_LD = case.lower_bound_LD()

    @jax.jit
    def run(key, x_BTD):
        scan_inputs = (x_BTD, jnp.arange(LAYERS), bound_LD)
        params = nn.unbox(stack.init(key, *scan_inputs))
        y_BTD, states = stack.apply(params, *scan_inputs)
        one_by_one = []
        for index in range(LAYERS):
            layer_params = jax.tree.map(lambda p, i=index: p[i], params)
            bound_D = None if bound_LD is None else bound_LD[index]
            x_BTD, state = block.apply(layer_params, x_BTD, index, bound_D)
            one_by_one.append(state)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
        return (y_BTD, states), (x_BTD, stacked)

    scanned, looped = run(jax.random.key(0), normal(B, 4, D))
    assert_close(scanned, looped, ERROR_FLOAT32, "layers")


class Recall(nn.Module):
    """Embedding, one mixer, classes."""

    case: Case

    @nn.compact
    def __call__(self, tokens_BT):
        x_BTD = nn.Embed(8, D, embedding_init=nn.initializers.normal(1.0))(tokens_BT)
        y_BTD, _ = self.case.make(name="mixer")(x_BTD, layer=self.case.layer())
        return nn.Dense(4)(nn.RMSNorm()(x_BTD + y_BTD))


def recall_batch(rng):
    """Noise (tokens 4-7) with one value (0-3) in the first half; every token after it must name the value."""
    tokens_BT = rng.integers(4, 8, (TRAIN_STEPS, TRAIN_BATCH, TRAIN_LENGTH))
    place_B = rng.integers(0, TRAIN_LENGTH // 2, tokens_BT.shape[:2])
    value_B = rng.integers(0, 4, tokens_BT.shape[:2])
    np.put_along_axis(tokens_BT, place_B[..., None], value_B[..., None], axis=-1)
    mask_BT = np.arange(TRAIN_LENGTH) > place_B[..., None]
    return tokens_BT.astype(np.int32), value_B.astype(np.int32), mask_BT.astype(np.float32)


def check_trains(case: Case):
    """One layer learns to remember one value: the loss leaves log 4 = 1.39 and ends under half of it."""
    model, optimizer = Recall(case), optax.adam(1e-2)

    @jax.jit
    def train(key, batches):
        params = nn.unbox(model.init(key, batches[0][0]))

        def loss(params, tokens_BT, value_B, mask_BT):
            label_BT = jnp.broadcast_to(value_B[:, None], tokens_BT.shape)
            losses_BT = optax.softmax_cross_entropy_with_integer_labels(
                model.apply(params, tokens_BT), label_BT
            )
            return jnp.sum(losses_BT * mask_BT) / jnp.sum(mask_BT)

        def step(carry, batch):
            params, opt_state = carry
            value, grads = jax.value_and_grad(loss)(params, *batch)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]

    losses = np.asarray(train(jax.random.key(0), recall_batch(np.random.default_rng(0))))
    assert losses[:3].mean() > 1.0, f"already low at the start: {losses[:3]}"
    assert losses[-5:].mean() < 0.69, f"loss went from {losses[0]:.2f} to {losses[-5:].mean():.2f}"
