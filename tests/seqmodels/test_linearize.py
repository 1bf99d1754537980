"""Students against what their methods promise before any training, and the transforms of parameters
behind them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import language_model, mixers
from seqmodels.linearize import layer_trees, lora, objectives, partition, students, transfer
from seqmodels.mixers import lolcats
from seqmodels.modules import attention_maps, blocks, feature_maps, pattern
from tests.seqmodels.mixers import mixer_suite as suite

L, T, D, W = 4, 24, 16, 31
TEACHER = {
    "vocab_size": W,
    "d_model": D,
    "d_ff": 16,
    "num_layers": L,
    "pattern": "attention(num_heads=4, num_kv_heads=2, max_length=64, rope_base=100.0)",
}


@functools.cache
def teacher():
    model = language_model.from_config(TEACHER)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return model, nn.unbox(params)["params"]


def student(text, layers="all", seed=1):
    model, params = teacher()
    chosen = students.choose_layers(model.mixers, layers)
    specs = students.student_specs(model, text, chosen)
    new = language_model.from_config(students.student_config(TEACHER, specs))
    return new, students.seed_params(jax.random.key(seed), model, params, new)


def tokens(B=2):
    return jnp.asarray(np.random.default_rng(0).integers(0, W, (B, T)), jnp.int32)


def segment_ids(B=2):
    return jnp.asarray(np.repeat([[1, 2, 3]], [5, 11, 8], axis=1).repeat(B, 0), jnp.int32)


def batch():
    return {"inputs": tokens(), "segment_ids": segment_ids()}


def logits(model, params):
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens(), segment_ids())[0])
    return apply(params)


# Before any training


def test_a_student_that_keeps_softmax_is_the_teacher_exactly():
    np.testing.assert_array_equal(logits(*student("attention")), logits(*teacher()))


def attention_and(name, seed=0, **options):
    """(y of full softmax attention, y of the student's mixer) with the teacher's weights, x, its
    other parameters as initialised."""
    common = {"d_model": D, "num_heads": 4, "num_kv_heads": 2, "rope_base": 100.0}
    x_BTD = suite.normal(2, T, D, seed=seed)
    full = mixers.make("attention", max_length=T, **common)
    params = nn.unbox(full.init(jax.random.key(seed), x_BTD))["params"]
    mixer = mixers.make(name, **common, **options)
    own = nn.unbox(mixer.init(jax.random.key(seed + 1), x_BTD))["params"]
    own |= {name: params[name] for name in "qkvo"}
    y_BTD, _ = full.apply({"params": params}, x_BTD, segment_ids())
    return y_BTD, mixer.apply({"params": own}, x_BTD, segment_ids())[0]


@pytest.mark.slow
def test_a_window_that_holds_all_is_softmax_attention():
    suite.assert_close(*attention_and("lolcats", window=T)[::-1], 1e-5, "lolcats")
    suite.assert_close(*attention_and("liger", window=T, mix=0.0)[::-1], 1e-5, "liger")


@pytest.mark.slow
def test_identity_convolutions_change_nothing():
    _, without = attention_and("lawcat", conv_width=None, features=4)
    _, convolved = attention_and("lawcat", conv_width=4, features=4)
    np.testing.assert_allclose(convolved, without, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_selective_layer_at_one_is_softmax_attention():
    model, params = student("selective")
    shared, layers = layer_trees.split(model, params)
    for layer in layers:
        layer["mixer"]["mix_logit"] = jnp.full((1,), 40.0)
    params = layer_trees.join(model, shared, layers)
    np.testing.assert_array_equal(logits(model, params), logits(*teacher()))


def test_mimicry_starts_from_a_constant_decay_near_one():
    x_BTD = suite.normal(1, 3, D)
    mixer = mixers.make("mmmamba", d_model=D)
    params = nn.unbox(mixer.init(jax.random.key(0), x_BTD))["params"]
    assert not np.any(params["dt"]["kernel"])
    decay_H = np.exp(-np.e * np.log1p(np.exp(params["decay"]["dt_bias"])))
    np.testing.assert_allclose(params["decay"]["A_log"], 1.0, rtol=1e-6)
    assert np.all((decay_H > 0.75) & (decay_H < 0.9975))
    kernel_ID = params["q_conv"]["kernel"]
    np.testing.assert_array_equal(kernel_ID, [[0.0] * D, [1.0] * D])


def test_without_mimicry_the_steps_have_no_bias():
    mixer = mixers.make("mmmamba", d_model=D, seed="scratch")
    params = nn.unbox(mixer.init(jax.random.key(0), suite.normal(1, 3, D)))["params"]
    assert not np.any(params["decay"]["dt_bias"]) and np.any(params["dt"]["kernel"])
    assert np.all((params["decay"]["A_log"] >= 0) & (params["decay"]["A_log"] <= np.log(16)))


@pytest.mark.slow
def test_the_lolcats_definition_token_by_token():
    """The window, what leaves it, and the one denominator, written out."""
    w, K, H = 3, 4, 2
    mixer = mixers.make("lolcats", d_model=8, num_heads=H, window=w, rope_base=None)
    x_BTD = suite.normal(1, 9, 8, seed=3)
    params = nn.unbox(mixer.init(jax.random.key(0), x_BTD))["params"]
    params["factor"] = jnp.array([-0.5, 0.8])
    params["q_map"]["kernel"] += 0.3 * suite.normal(H, K, K, seed=4)
    found, _ = mixer.apply({"params": params}, x_BTD)

    x = np.asarray(x_BTD[0], np.float64)
    q, k, v = (
        (x @ np.asarray(params[n]["kernel"], np.float64)).reshape(9, H, K).swapaxes(0, 1)
        for n in "qkv"
    )
    phi = {}
    for name, z in (("q_map", q), ("k_map", k)):
        z = np.einsum("htk,hkf->htf", z, params[name]["kernel"])
        parts = [np.exp(s) / np.exp(s).sum(-1, keepdims=True) for s in (z, -z)]
        phi[name] = np.concatenate(parts, axis=-1)
    g = 1 / (1 + np.exp(-np.asarray(params["factor"], np.float64)))
    o = np.zeros((H, 9, K))
    for h in range(H):
        for m in range(9):
            a = np.array([phi["q_map"][h, m] @ phi["k_map"][h, n] for n in range(m + 1)])
            near = range(max(0, m - w + 1), m + 1)
            exponent = np.array([q[h, m] @ k[h, n] / np.sqrt(K) for n in near])
            a[near.start :] = g[h] * np.exp(exponent - exponent.max())
            o[h, m] = a @ v[h, : m + 1] / a.sum()
    expected = o.swapaxes(0, 1).reshape(9, H * K) @ np.asarray(params["o"]["kernel"], np.float64)
    suite.assert_close(found[0], expected, 1e-5, "lolcats")


def test_liger_adds_no_parameters():
    for gate in ("gla", "hgrn2", "scalar", "none"):
        _, params = student(f"liger(gate={gate!r})")
        assert suite_paths(params) == suite_paths(teacher()[1])


def suite_paths(tree):
    return {(path, leaf.shape) for path, leaf in partition.flatten(tree).items()}


# Students


def test_layers_are_chosen():
    specs = teacher()[0].mixers
    assert students.choose_layers(specs) == (0, 1, 2, 3)
    assert students.choose_layers(specs, keep_every=2) == (0, 2)
    assert students.choose_layers(specs, keep_every=4, keep="first") == (1, 2, 3)
    assert students.choose_layers(specs, "0,2-3") == (0, 2, 3)
    with pytest.raises(ValueError, match=r"layers \[4, 5\] are not there: the teacher has 4"):
        students.choose_layers(specs, "3-5")
    with pytest.raises(ValueError, match="are not there: the teacher has 4"):
        students.choose_layers(specs, "0-99999999999")
    for text in ("first", "0-", "3-1"):
        with pytest.raises(ValueError, match=f"cannot be read at '{text}'"):
            students.choose_layers(specs, text)
    hybrid = pattern.layers("gla + attention", 4)
    assert students.choose_layers(hybrid) == (1, 3)
    with pytest.raises(ValueError, match=r"layers \[0\] are not softmax attention but gla"):
        students.choose_layers(hybrid, "0-1")


def test_options_come_from_the_teachers_layer():
    spec = teacher()[0].mixers[0]
    assert students.inherited(spec, "liger", D) == dict(spec.options)
    assert "rope_base" not in students.inherited(spec, "mmmamba", D)
    assert students.inherited(spec, "gated_delta_net", D) == {"num_heads": 4, "head_dim": 4}
    assert students.inherited(spec, "mamba2", D)["num_groups"] == 4
    windowed = pattern.parse("attention(num_heads=4, window=8)")[0]
    assert students.inherited(windowed, "attention", D) == dict(windowed.options)
    assert "window" not in students.inherited(windowed, "liger", D)
    with pytest.raises(ValueError, match="the teacher's layer has window=8: take lolcats or liger"):
        students.inherited(windowed, "selective", D)


@pytest.mark.slow
def test_mamba_in_the_llama_takes_over_the_projections():
    model, params = student("mamba2", "1")
    _, layers = layer_trees.split(model, params)
    _, theirs = layer_trees.split(*teacher())
    own, source = layers[1]["mixer"], theirs[1]["mixer"]
    np.testing.assert_array_equal(own["C"]["kernel"], source["q"]["kernel"])
    np.testing.assert_array_equal(own["o"]["kernel"], source["o"]["kernel"])
    k_DGK = np.asarray(source["k"]["kernel"]).reshape(D, 2, 4)
    np.testing.assert_array_equal(
        np.asarray(own["B"]["kernel"]).reshape(D, 4, 4), k_DGK.repeat(2, 1)
    )
    assert np.any(own["z"]["kernel"])


@pytest.mark.parametrize("text", ["3*gla + attention", "gla", "gla + 2*(attention + gla)"])
def test_layers_are_split_and_joined(text):
    model = language_model.from_config(TEACHER | {"pattern": text, "num_layers": 5})
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    shared, layers = layer_trees.split(model, boxed)
    assert len(layers) == 5 and "embed" in shared
    again = layer_trees.join(model, shared, layers)
    assert jax.tree.structure(again) == jax.tree.structure(boxed)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), nn.unbox(boxed))
    jax.tree.map(
        np.testing.assert_array_equal,
        layer_trees.join(model, *layer_trees.split(model, params)),
        jax.tree.map(jnp.asarray, params),
    )


def test_the_layers_that_were_chosen():
    model, params = student("selective")
    shared, layers = layer_trees.split(model, params)
    for layer, logit in zip(layers, (3.0, -3.0, 1.0, -0.1)):
        layer["mixer"]["mix_logit"] = jnp.full((1,), logit)
    params = layer_trees.join(model, shared, layers)
    found = students.chosen(model, params)
    assert [s.name for s in found.specs] == ["attention", "lolcats", "attention", "lolcats"]
    new = language_model.from_config(students.student_config(TEACHER, found.specs))
    params = layer_trees.join(new, found.shared, found.layers)
    expected = jax.eval_shape(new.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert suite_paths(params) == suite_paths(nn.unbox(expected))


def test_the_penalty_wants_so_many_layers_at_one():
    def penalty(logits, target):
        tree = {
            f"block_{i}": {"mixer": {"mix_logit": jnp.array([x])}} for i, x in enumerate(logits)
        }
        return objectives.selection_penalty(tree, target)

    polar = penalty([40.0, -40.0, 40.0], 2)
    np.testing.assert_allclose(polar, 0.0, atol=1e-4)
    assert penalty([40.0, -40.0, 40.0], 1) > 0.99
    assert penalty([40.0, 0.01, 40.0], 3) > polar + 0.9
    with pytest.raises(ValueError, match="select_target is 4, and the student has 3"):
        penalty([0.0, 0.0, 0.0], 4)


# Adapters and trainable sets


def lora_case(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    boxed = {
        "blocks": {"mixer": {"q": {"kernel": ((3, 8, 6), ("layers", "embed", "heads"))}}},
        "block_3": {"mixer": {"q": {"kernel": ((8, 6), ("embed", "heads"))}}},
        "conv": {"kernel": ((2, 4, 8), (None, None, "heads"))},
    }
    boxed = jax.tree.map(
        lambda x: nn.LogicallyPartitioned(
            jnp.asarray(0.1 * rng.standard_normal(x[0]), dtype), x[1]
        ),
        boxed,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return boxed, nn.unbox(boxed)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adapters_are_added_to_their_kernels_alone(dtype):
    boxed, params = lora_case(dtype)
    adapters = nn.unbox(lora.init(jax.random.key(0), boxed, "kernel$", 2))
    shapes = {path: leaf.shape for path, leaf in partition.flatten(adapters).items()}
    assert shapes["blocks/mixer/q/lora_A"] == (3, 8, 2)
    assert shapes["block_3/mixer/q/lora_B"] == (2, 6)
    assert not any(path.startswith("conv") for path in shapes)
    zero = lora.merge(params, adapters, 8.0)
    jax.tree.map(np.testing.assert_array_equal, zero, params)

    adapters = jax.tree.map(lambda x: x + suite.normal(*x.shape, seed=2), adapters)
    merged = lora.merge(params, adapters, 8.0)
    expected = params["block_3"]["mixer"]["q"]["kernel"].astype(jnp.float32) + 4.0 * (
        adapters["block_3"]["mixer"]["q"]["lora_A"] @ adapters["block_3"]["mixer"]["q"]["lora_B"]
    )
    limit = 1e-5 if dtype == jnp.float32 else 2e-2
    suite.assert_close(merged["block_3"]["mixer"]["q"]["kernel"], expected, limit, "merged")
    jax.tree.map(np.testing.assert_array_equal, merged["conv"], params["conv"])


def test_adapters_refuse_what_they_cannot_have():
    boxed, _ = lora_case()
    with pytest.raises(ValueError, match="'norm' matches no kernel.*block_3/mixer/q/kernel"):
        lora.init(jax.random.key(0), boxed, "norm", 2)
    with pytest.raises(ValueError, match="lora_rank is 0"):
        lora.init(jax.random.key(0), boxed, "kernel", 0)


def test_trees_are_cut_and_put_together():
    _, params = lora_case()
    chosen, others = partition.split(params, partition.matches("mixer/q"))
    assert set(partition.flatten(others)) == {"conv/kernel"}
    jax.tree.map(np.testing.assert_array_equal, partition.merge(others, chosen), params)
    with pytest.raises(ValueError, match="train: pattern 'mixer/z' matches no parameter; there"):
        partition.require(params, "mixer/z", "train")
    with pytest.raises(ValueError, match="no regular expression"):
        partition.matches("(")


# Transfer


def run_transfer(text, layers="all", remat="none"):
    model, params = teacher()
    new, own = student(text, layers)
    new = new.clone(remat=remat)
    both = transfer.make_model(model, new)
    joined = transfer.params(both, (model, params), (new, own))
    return both, joined, new, own


@pytest.mark.slow
def test_transfer_compares_layers_on_the_teachers_hidden_states():
    """One pass against the layers written out one by one."""
    model, joined, new, own = run_transfer("liger(window=4)", "1,3", remat="full")
    found = jax.jit(lambda p: transfer.losses(model, p, batch()))(joined)
    source, params = teacher()
    _, layers = layer_trees.split(source, params)
    _, own_layers = layer_trees.split(new, own)
    x_BTD = params["embed"]["embedding"][tokens()]
    mixer_losses, block_losses = [], []

    def run(spec, tree, x_BTD, i):
        options = {k: getattr(source, k) for k in ("d_model", "d_ff", "norm_eps")}
        place = mixers.Layer(i, L, None)
        block = blocks.Block(spec, **options)
        return block.apply({"params": tree}, x_BTD, segment_ids(), None, None, place)[0]

    for i in range(L):
        out_BTD = run(source.mixers[i], layers[i], x_BTD, i)
        if i in (1, 3):
            y_BTD = run(new.mixers[i], own_layers[i], x_BTD, i)
            block_losses.append(jnp.mean(jnp.square(y_BTD - out_BTD), axis=-1))
            no_channels = [x | {"channel_mixer": jax.tree.map(jnp.zeros_like, x["channel_mixer"])}
                           for x in (layers[i], own_layers[i])]  # fmt: skip
            a, b = (run(m.mixers[i], x, x_BTD, i) for m, x in zip((source, new), no_channels))
            mixer_losses.append(jnp.mean(jnp.square(a - b), axis=-1))
        x_BTD = out_BTD
    suite.assert_close(found["block"], sum(block_losses) / 2, 1e-4, "block")
    suite.assert_close(found["mixer"], sum(mixer_losses) / 2, 1e-4, "mixer")
    again = transfer.student_params(model, new, joined, transfer.kept(model, (new, own)))
    jax.tree.map(np.testing.assert_array_equal, again, own)

    with pytest.raises(ValueError, match="no converted layer gives 'attention_map'; they give"):
        weights = {"attention_map": 1.0}
        jax.eval_shape(lambda p: objectives.transfer_loss(model, p, batch(), weights), joined)


def test_transfer_leaves_what_it_does_not_convert():
    """A kept layer, and what is outside of layers, after an earlier stage trained them; the
    teacher's pass reads the teacher's."""
    model, params = teacher()
    new, own = student("liger(window=4)", "1,3")
    shared, layers = layer_trees.split(new, own)
    shared = jax.tree.map(lambda x: x + 1.0, shared)
    layers[0] = jax.tree.map(lambda x: x + 1.0, layers[0])
    own = layer_trees.join(new, shared, layers)
    both = transfer.make_model(model, new)
    joined = transfer.params(both, (model, params), (new, own))
    kept = transfer.kept(both, (new, own))
    assert set(kept["layers"]) == {"0", "2"}
    again = transfer.student_params(both, new, joined, kept)
    jax.tree.map(np.testing.assert_array_equal, again, own)
    np.testing.assert_array_equal(joined["embed"]["embedding"], params["embed"]["embedding"])


def test_the_loss_on_attention_maps_holds_a_piece_of_them():
    B, H, K, long = 1, 2, 4, 512
    q, k = suite.normal(B, long, H, K, seed=1), suite.normal(B, long, 1, K, seed=2)
    phi = jax.nn.softmax(suite.normal(B, long, H, K, seed=3))

    def loss(q, phi_q):
        return jnp.sum(attention_maps.cross_entropy(q, k, phi_q, phi, chunk_size=32)[0])

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(q, phi))
    assert f"{B},{H},32,{long}" in text
    assert f"{long},{long}" not in text


@pytest.mark.parametrize("window", [None, 3])
def test_the_loss_on_attention_maps(window):
    B, H, K = 2, 2, 4
    q, k = suite.normal(B, T, H, K, seed=1), suite.normal(B, T, 1, K, seed=2)
    phi_q, phi_k = (jax.nn.softmax(suite.normal(B, T, H, 6, seed=s)) for s in (3, 4))
    factor_H = jnp.array([0.3, 2.0]) if window else None
    found, own = attention_maps.cross_entropy(
        q, k, phi_q, phi_k, segment_ids(), window=window, factor_H=factor_H, chunk_size=7
    )
    ids = np.asarray(segment_ids()[0])
    index = np.arange(T)
    seen = (index[:, None] >= index) & (ids[:, None] == ids)
    exponent = np.einsum("bthk,bsk->bhts", q, k[:, :, 0]).astype(np.float64) / 2
    exponent = np.where(seen, exponent, -np.inf)
    P = np.exp(exponent) / np.exp(exponent).sum(-1, keepdims=True)
    a = np.where(seen, np.einsum("bthf,bshf->bhts", phi_q, phi_k).astype(np.float64), 0)
    if window:
        near = index[:, None] - index < window
        inside = np.where(near, exponent, -np.inf)
        inside = np.exp(inside - inside.max(-1, keepdims=True))
        a = np.where(near, np.asarray(factor_H)[None, :, None, None] * inside, a)
    Q = a / a.sum(-1, keepdims=True)
    expected = -np.where(seen, P * np.log(np.where(seen, Q, 1)), 0).sum(-1)
    suite.assert_close(found, expected.swapaxes(1, 2), 1e-4, "cross-entropy")
    entropy = -np.where(seen, P * np.log(np.where(seen, P, 1)), 0).sum(-1)
    suite.assert_close(own, entropy.swapaxes(1, 2), 1e-4, "entropy")


@pytest.mark.slow
def test_the_loss_on_attention_maps_where_pieces_do_not_divide_the_row():
    """The gradient as well; softmax's weights are the target, so that without a window q and k have
    none."""
    q, k = suite.normal(1, T, 2, 4, seed=1), suite.normal(1, T, 1, 4, seed=2)
    phi_q, phi_k = (jax.nn.softmax(suite.normal(1, T, 2, 6, seed=s)) for s in (3, 4))

    def loss(chunk_size, window, factor_H, q, k, phi_q):
        maps = attention_maps.cross_entropy(
            q, k, phi_q, phi_k, window=window, factor_H=factor_H, chunk_size=chunk_size
        )
        return jnp.sum(maps[0])

    grad = jax.jit(jax.grad(loss, (2, 3, 4, 5)), static_argnums=(0, 1))
    given = jnp.array([0.3, 2.0]), q, k, phi_q
    suite.assert_close(grad(7, 3, *given), grad(T, 3, *given), 1e-4, "gradient")
    _, dq, dk, _ = grad(7, None, *given)
    assert not np.any(dq) and not np.any(dk)


def test_students_decode_in_constant_memory():
    """The window's ring and the sums do not know of the cache's length."""
    window = {"window": 8}
    cases = {"liger": window, "lolcats": window, "lawcat": {"features": 4}, "mmmamba": {}}
    for name, options in cases.items():
        sizes = [
            [x.shape for x in jax.tree.leaves(mixer.init_state(1))]
            for n in (64, 4096)
            for mixer in [mixers.make(name, d_model=D, max_length=n, **options)]
        ]
        assert sizes[0] == sizes[1], name


def test_window_sums_take_memory_of_the_window():
    q = jax.ShapeDtypeStruct((1, 4096, 1, 4), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 4096 + 64, 1, 4), jnp.float32)
    flags = jax.ShapeDtypeStruct((1, 4096 + 64), bool)
    runs = jax.ShapeDtypeStruct((1, 4096 + 64), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda *a: lolcats.window_sums(*a, 64))(q, kv, kv, flags, runs)
    assert max(v.aval.size for e in jaxpr.eqns for v in e.outvars) <= 4096 * 128


def test_feature_maps_of_the_students_are_those_of_the_table():
    with pytest.raises(ValueError, match="'elu' takes both signs"):
        mixers.make("lolcats", d_model=D, feature_map="elu").init_state(1)
    assert feature_maps.output_dim("hedgehog_softmax", 4) == 8


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("liger", {"gate": "glu"}, "gate is 'glu'; choose one of gla, hgrn2, none, scalar"),
        ("liger", {"feature_map": "t2r"}, "gate 'gla' is one number per key channel"),
        ("lawcat", {"window": 4}, "it has no window"),
        ("selective", {"mix_init": 1.0}, "mix_init must lie between 0 and 1"),
        ("mmmamba", {"seed": "random"}, "seed is 'random'; choose one of mimic, scratch"),
    ],
)
def test_options_that_do_not_fit(name, options, message):
    with pytest.raises(ValueError, match=message):
        mixers.make(name, d_model=D, **options).init_state(1)
