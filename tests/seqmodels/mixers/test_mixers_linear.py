"""The mixers on `linear_attention` against their definitions: parameters, starts, equations.

Each equation is written out once more in NumPy float64, one token after the other. What all mixers
share is in `mixer_suite.py`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers
from seqmodels.mixers import hgrn2, mlstm, transnormer_llm

B, T, D, H = 2, 11, 32, 4


def make(name, layer=None, **options):
    """Returns the mixer, its first parameters, and the same plus noise in float64."""
    mixer = mixers.make(name, d_model=D, **options)
    init = jax.jit(functools.partial(mixer.init, layer=layer))
    first = nn.unbox(init(jax.random.key(0), jnp.zeros((1, 2, D))))["params"]
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda p: np.float64(p) + 0.1 * rng.standard_normal(p.shape), first)
    return mixer, first, noisy


def apply(mixer, params, x, layer=None):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    y, _ = jax.jit(functools.partial(mixer.apply, layer=layer))(
        {"params": params}, jnp.asarray(x, jnp.float32)
    )
    return np.asarray(y)


def inputs(scale=1.0):
    return scale * np.random.default_rng(1).standard_normal((B, T, D))


def shapes(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def dense(p, x, heads=None):
    y = x @ p["kernel"] + p.get("bias", 0.0)
    return y if heads is None else y.reshape(*y.shape[:-1], heads, -1)


def sigmoid(x):
    return np.where(
        x > 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))
    )


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms(x, eps, scale=1.0):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def layer_norm(x, eps, scale=1.0, bias=0.0):
    return rms(x - x.mean(axis=-1, keepdims=True), eps) * scale + bias


def rope(x):
    """Turns channels i and i + K/2 by t 10000^(-2i/K), as complex numbers."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * 10_000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def recurrence(q, k, v, decay=1.0):
    """Computes S = decay S + k v^T, o = S^T q; decay broadcasts to (B, T, H, K)."""
    decay = np.broadcast_to(decay, q.shape)
    S, out = np.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1])), []
    for t in range(q.shape[1]):
        S = decay[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(np.einsum("bhk,bhkv->bhv", q[:, t], S))
    return np.stack(out, axis=1)


def merge(o):
    return o.reshape(*o.shape[:2], -1)


def assert_equal(actual, expected, tolerance=2e-5):
    scale = np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


# Linear attention.


def test_linear_attention_normalised():
    mixer, first, p = make("linear_attention", k_map="relu", rope_base=10_000.0, eps=0.5)
    assert shapes(first) == {f"{name}/kernel": (D, D) for name in "kqvo"}
    x = inputs()
    q, k, v = (dense(p[name], x, H) for name in "qkv")
    q, k = rope(q), np.maximum(rope(k), 0)
    q = np.where(q > 0, q + 1, np.exp(q))
    weights = np.einsum("bthk,bshk->bhts", q, k) * np.tri(T)
    o = np.einsum("bhts,bshv->bthv", weights / (weights.sum(axis=-1, keepdims=True) + 0.5), v)
    assert_equal(apply(mixer, p, x), dense(p["o"], merge(o)))


def test_linear_attention_unnormalised_with_norm():
    mixer, first, p = make(
        "linear_attention", q_map="hedgehog_joint", normalize=False, output_norm="rms_norm"
    )
    F, K = 2 * D // H, D // H
    assert first["k_map"]["kernel"].shape == first["q_map"]["kernel"].shape == (H, K, K)
    assert mixer.init_state(B).S_BHFV.shape == (B, H, F, K)
    x = inputs()
    q, k, v = (dense(p[name], x, H) for name in "qkv")

    def phi(x, p):
        z = 2 * (np.einsum("bthk,hkf->bthf", x, p["kernel"]) + p["bias"])
        return softmax(np.concatenate([z, -z], axis=-1))

    o = recurrence(phi(q, p["q_map"]) * F**-0.5, phi(k, p["k_map"]), v)
    o = rms(o, 1e-5, p["o_norm"]["scale"])
    assert_equal(apply(mixer, p, x), dense(p["o"], merge(o)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"q_map": "silu"}, "'silu' takes both signs.*normalize=False"),
        ({"k_map": "hedgehog_paper"}, "'elu_plus_one' gives 8 features.*'hedgehog_paper' 16"),
        ({"q_map": "exp"}, "unknown feature map 'exp'; choose one of"),
        ({"num_heads": 5}, "num_heads 5 must divide d_model 32"),
        ({"output_norm": "batch"}, "output_norm is 'batch'; choose one of"),
    ],
)
def test_linear_attention_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        mixers.make("linear_attention", d_model=D, **options).init_state(1)


# TransNormer.


def test_transnormer_starts_xavier_uniform():
    mixer = mixers.make("transnormer", d_model=400)
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 400))))["params"]
    for name in "qkvo":
        bound = np.sqrt(6 / 800) / (1 if name == "o" else np.sqrt(2))
        kernel = np.asarray(params[name]["kernel"])
        assert 0.999 * bound < np.abs(kernel).max() <= bound, name
        assert abs(kernel.std() / (bound / np.sqrt(3)) - 1) < 0.01, name
        assert not np.any(params[name]["bias"]), name


@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_transnormer(variant):
    mixer, first, p = make("transnormer", variant=variant)
    expected = {f"{name}/kernel": (D, D) for name in "kqvo"} | {f"{n}/bias": (D,) for n in "kqvo"}
    norm = {"o_norm/norm/scale": (D,), "o_norm/norm/bias": (D,)}
    assert shapes(first) == expected | norm
    x = inputs()
    q, k, v = (dense(p[name], x, H) for name in "qkv")
    q, k = (np.where(z > 0, z, np.expm1(z)) + (variant == "t2") for z in (q, k))
    o = layer_norm(merge(recurrence(q, k, v)), 1e-5, **p["o_norm"]["norm"])
    assert_equal(apply(mixer, p, x), dense(p["o"], o))


def test_transnormer_lrpe_and_gated_norm():
    mixer, first, p = make("transnormer", lrpe=True, norm="gated_rms_norm")
    K = D // H
    theta = (10_000.0 ** (-2 * np.arange(D) / D)).reshape(H, K)
    np.testing.assert_allclose(first["lrpe"]["theta"], theta, rtol=1e-6)
    assert mixer.init_state(B).S_BHKV.shape == (B, H, 2 * K, K)
    x = inputs()
    q, k, v = (dense(p[name], x, H) for name in "qkv")
    q, k = (np.where(z > 0, z + 1, np.exp(z)) for z in (q, k))
    age = np.arange(T)[:, None] - np.arange(T)[None]
    turn = np.cos(p["lrpe"]["theta"][:, None, None] * age[None, :, :, None])
    weights = np.einsum("bthk,bshk,htsk->bhts", q, k, turn) * np.tri(T)
    o = merge(np.einsum("bhts,bshv->bthv", weights, v))
    o = rms(o, 1e-5, p["o_norm"]["rms"]["scale"]) * sigmoid(p["o_norm"]["gate"] * o)
    assert_equal(apply(mixer, p, x), dense(p["o"], o))


@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_transnormer_local(variant):
    mixer, _, p = make("transnormer_local", variant=variant, block_size=4, norm="srms_norm")
    x, block = inputs(), np.arange(T) // 4
    q, k, v = (dense(p[name], x, H) for name in "qkv")
    seen = np.tri(T, dtype=bool) & (block[:, None] == block[None])
    logits = np.einsum("bthk,bshk->bhts", q, k) * (D // H) ** -0.5
    if variant == "t1":
        weights = np.maximum(logits, 0) * seen
    else:
        weights = softmax(np.where(seen, logits, -np.inf))
    o = rms(merge(np.einsum("bhts,bshv->bthv", weights, v)), 1e-5)
    assert_equal(apply(mixer, p, x), dense(p["o"], o))


def test_transnormer_local_refuses_an_implementation_that_it_would_ignore():
    mixer = mixers.make("transnormer_local", d_model=8, implementation="chunked")
    with pytest.raises(ValueError, match="implementation 'chunked' chooses nothing"):
        mixer.init_state(1)


@pytest.mark.parametrize("name", ["transnormer", "transnormer_local"])
def test_transnormer_refuses(name):
    with pytest.raises(ValueError, match="variant is 't3'; choose one of t1, t2"):
        mixers.make(name, d_model=D, variant="t3").init_state(1)
    with pytest.raises(ValueError, match="norm is 'batch'; choose one of gated_rms_norm, layer"):
        mixers.make(name, d_model=D, norm="batch").init_state(1)


# TransNormerLLM.


def test_slope_rules():
    slopes = functools.partial(transnormer_llm.decay_slopes, heads=4, count=5)
    np.testing.assert_allclose(slopes("arithmetic", index=0), [0, 2, 4, 6])
    np.testing.assert_allclose(slopes("arithmetic", index=4), np.array([0, 2, 4, 6]) / 5, rtol=1e-6)
    alibi = 2.0 ** -np.array([2, 4, 6, 8])
    np.testing.assert_allclose(slopes("alibi", index=0), alibi * (1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(slopes("alibi", index=2), alibi * (0.5 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(slopes("alibi", index=4), alibi * 1e-5, rtol=1e-3)


def test_alibi_slopes_of_six_heads_interpolate():
    six = transnormer_llm.decay_slopes("alibi", 6, 0, 2) / (1 + 1e-5)
    np.testing.assert_allclose(six, 2.0 ** -np.array([2, 4, 6, 8, 1, 3]), rtol=1e-6)


def test_transnormer_llm():
    layer = mixers.Layer(1, 4)
    mixer, first, p = make("transnormer_llm", layer)
    assert shapes(first) == {f"{name}/kernel": (D, D) for name in "kqvuo"}
    x = inputs()
    q, k, v = (dense(p[name], x, H) for name in "qkv")
    decay = np.exp(-8 * np.arange(H) / H * (1 - 1 / 4))[:, None]
    o = rms(merge(recurrence(silu(q), silu(k), v, decay)), 1e-6)
    y = dense(p["o"], o * dense(p["u"], x))
    assert_equal(apply(mixer, p, x, layer), y)
    assert np.abs(apply(mixer, p, x, mixers.Layer(3, 4)) - y).max() > 1e-2


def test_transnormer_llm_refuses():
    with pytest.raises(ValueError, match="slopes is 'geometric'; choose one of alibi, arithmetic"):
        mixers.make("transnormer_llm", d_model=D, slopes="geometric").init_state(1)


# RetNet, GLA, HGRN2.


def test_retnet():
    mixer, first, p = make("retnet")
    wide = {f"{name}/kernel": (D, 2 * D) for name in "gv"} | {"o/kernel": (2 * D, D)}
    square = {f"{name}/kernel": (D, D) for name in "kq"}
    assert shapes(first) == square | wide | {"o_norm/scale": (2 * D // H,)}
    x = inputs()
    q, k, v, g = (dense(p[name], x, H) for name in "qkvg")
    gamma = (1 - 2.0 ** (-5 - np.arange(H)))[:, None]
    o = recurrence(rope(q) * (D // H) ** -0.5, rope(k), v, gamma)
    o = rms(o, 1e-5, p["o_norm"]["scale"]) * silu(g)
    assert_equal(apply(mixer, p, x), dense(p["o"], merge(o)))


def test_gla():
    mixer, first, p = make("gla")
    expected = {"q/kernel": (D, D // 2), "k/kernel": (D, D // 2), "gk_down/kernel": (D, 16)}
    expected |= {"gk_up/kernel": (16, D // 2), "gk_up/bias": (D // 2,), "o_norm/scale": (D // H,)}
    assert shapes(first) == expected | {f"{name}/kernel": (D, D) for name in "vgo"}
    assert not np.any(first["gk_up"]["bias"])
    x = inputs()
    q, k, v, g = (dense(p[name], x, H) for name in "qkvg")
    alpha = sigmoid(dense(p["gk_up"], dense(p["gk_down"], x), H)) ** (1 / 16)
    o = rms(recurrence(q * (D // 2 // H) ** -0.5, k, v, alpha), 1e-5, p["o_norm"]["scale"])
    assert_equal(apply(mixer, p, x), dense(p["o"], merge(o * silu(g))))


@pytest.mark.parametrize("bounded", [False, True])
def test_hgrn2(bounded):
    bound = np.linspace(0.05, 0.9, D) if bounded else np.zeros(D)
    layer = mixers.Layer(1, 2, jnp.asarray(bound, jnp.float32)) if bounded else None
    mixer, first, p = make("hgrn2", layer, expand_ratio=8)
    kernels = {f"{name}/kernel": (D, D) for name in "qfio"}
    assert shapes(first) == kernels | {"o_norm/scale": (D,)}
    x = inputs()
    q, f, v = (dense(p[name], x, 4) for name in "qfi")
    bound = bound.reshape(4, 8)
    g = bound + (1 - bound) * sigmoid(f)
    o = rms(merge(recurrence(silu(q), 1 - g, v, g)), 1e-5, p["o_norm"]["scale"])
    assert_equal(apply(mixer, p, x, layer), dense(p["o"], o))


def test_bounded_forget_gate_is_exact_and_finite():
    f, lb = np.meshgrid([-600.0, -90, -30, -1, 0, 1, 15, 90, 600], [0, 1e-30, 0.1, 0.999])
    f, lb = (np.float32(a.ravel()) for a in (f, lb))
    log_g, k = hgrn2.bounded_forget_gate(f, lb)
    f64, lb64 = np.float64(f), np.float64(lb)
    np.testing.assert_allclose(log_g, np.log(lb64 + (1 - lb64) * sigmoid(f64)), 3e-6, atol=1e-15)
    np.testing.assert_allclose(k, (1 - lb64) * sigmoid(-f64), rtol=1e-5, atol=1e-37)
    assert np.all(log_g <= 0)

    def log_g_of(f, lb):
        return hgrn2.bounded_forget_gate(f, lb)[0]

    f_bar, lb_bar = jax.jit(jax.vmap(jax.grad(log_g_of, argnums=(0, 1))))(f, lb)
    g_bar = 1 / (lb64 + (1 - lb64) * sigmoid(f64))
    f_exact = g_bar * (1 - lb64) * sigmoid(f64) * sigmoid(-f64)
    # where g is lb but for a little, the gradient is the difference of two numbers near 1
    np.testing.assert_allclose(f_bar, f_exact, rtol=1e-4, atol=1e-7)
    # lb = 0 is a constant, the first layer's
    lb_exact = np.where(lb == 0, lb_bar, g_bar * sigmoid(-f64))
    np.testing.assert_allclose(lb_bar, lb_exact, rtol=1e-4, atol=1e-7)
    assert np.isfinite(lb_bar).all()


# mLSTM.


def test_mlstm_parameters_and_first_values():
    mixer, first, _ = make("mlstm")
    expected = {"q/kernel": (D, D // 2), "k/kernel": (D, D // 2), "h_norm/scale": (H, D // H)}
    expected |= {f"{name}/kernel": (D, D) for name in "vgo"}
    expected |= {"i/kernel": (D, H), "f/kernel": (D, H), "i/bias": (H,), "f/bias": (H,)}
    assert shapes(first) == expected
    assert not np.any(first["i"]["kernel"]) and not np.any(first["f"]["kernel"])
    np.testing.assert_allclose(first["i"]["bias"], -10.0)
    np.testing.assert_allclose(first["f"]["bias"], [3, 4, 5, 6])
    assert mixer.init_state(B).S_BHKV.shape == (B, H, D // 2 // H, D // H + 1)


def mlstm_gates(p, x):
    return (15 * np.tanh(dense(p[name], x) / 15) for name in "if")


def mlstm_output(p, x, h):
    h = layer_norm(h, 1e-6, p["h_norm"]["scale"])
    return dense(p["o"], merge(sigmoid(dense(p["g"], x, H)) * h))


def mlstm_qkv(p, x):
    q, k, v = (dense(p[name], x, H) for name in "qkv")
    return q * (D // 2 // H) ** -0.5, k, v


def test_mlstm_exponential_gate():
    mixer, _, p = make("mlstm", input_gate_bias=0.0)
    p["i"]["kernel"] *= 10
    x = inputs()
    q, k, v = mlstm_qkv(p, x)
    i, f = mlstm_gates(p, x)
    k = np.exp(i)[..., None] * k
    f = sigmoid(f)[..., None]
    weight = recurrence(q, k, np.ones_like(v[..., :1]), f)
    h = recurrence(q, k, v, f) / np.maximum(np.abs(weight), 1.0)
    assert np.any(np.abs(weight) < 1) and np.any(np.abs(weight) > 1)
    assert_equal(apply(mixer, p, x), mlstm_output(p, x, h), tolerance=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_mlstm_sigmoid_gate(normalize):
    mixer, _, p = make("mlstm", input_gate="sigmoid", normalize=normalize, input_gate_bias=1.0)
    assert mixer.init_state(B).m_BH is None
    assert mixer.init_state(B).S_BHKV.shape[-1] == D // H + normalize
    x = inputs(4.0)
    q, k, v = mlstm_qkv(p, x)
    i, f = (sigmoid(gate)[..., None] for gate in mlstm_gates(p, x))
    h, weight = recurrence(q, i * k, v, f), recurrence(q, i * k, np.ones_like(v[..., :1]), f)
    if normalize:
        h /= np.maximum(np.abs(weight), 1.0)
        assert np.any(np.abs(weight) > 1)
    assert_equal(apply(mixer, p, x), mlstm_output(p, x, h), tolerance=1e-4)


def sequential_stabiliser(log_f, i, m, segment_ids):
    """Computes m_t = max(log f_t + m_{t-1}, i_t), from 0 where a document starts."""
    out = []
    for t in range(log_f.shape[1]):
        if t:
            new = segment_ids[:, t] != segment_ids[:, t - 1]
            m = np.where(new[:, None], 0.0, m)
        m = np.maximum(log_f[:, t] + m, i[:, t])
        out.append(m)
    return np.stack(out, axis=1)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_stabiliser_equals_the_sequential_one(scale):
    rng = np.random.default_rng(0)
    f, i = scale * rng.standard_normal((2, 3, 100, 5))
    log_f = -np.logaddexp(0, -f)
    m = scale * rng.standard_normal((3, 5))
    ids = np.sort(rng.integers(0, 9, (3, 100)), axis=1).astype(np.int32)
    for segment_ids in (None, ids):
        expected = sequential_stabiliser(
            log_f, i, m, np.zeros_like(ids) if segment_ids is None else segment_ids
        )
        actual = jax.jit(mlstm.stabiliser)(
            *(jnp.asarray(a, jnp.float32) for a in (log_f, i, m)), segment_ids
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * scale)


@functools.cache
def extreme_mlstm():
    """Gates of a few hundred without a soft cap stay finite, in documents of their own."""
    mixer, _, p = make("mlstm", gate_soft_cap=None, input_gate_bias=0.0)
    for name in "if":
        p[name]["kernel"] *= 1000
    return mixer, p


def test_mlstm_extreme_gates_follow_the_stabilised_recurrence():
    mixer, p = extreme_mlstm()
    x = inputs()
    q, k, v = mlstm_qkv(p, x)
    i, f = dense(p["i"], x), dense(p["f"], x)
    assert np.abs(i).max() > 500 and np.abs(f).max() > 500
    # As published: C, n and m by their update rules; e^-m may overflow to inf, and h is then 0.
    log_f, m = -np.logaddexp(0, -f), np.zeros((B, H))
    C, n, out = np.zeros((B, H, 4, 8)), np.zeros((B, H, 4)), []
    for t in range(T):
        before, m = m, np.maximum(log_f[:, t] + m, i[:, t])
        decay, gain = np.exp(log_f[:, t] + before - m)[..., None], np.exp(i[:, t] - m)[..., None]
        C = decay[..., None] * C + (gain * k[:, t])[..., None] * v[:, t, :, None]
        n = decay * n + gain * k[:, t]
        with np.errstate(over="ignore"):
            weight = np.maximum(np.abs(np.sum(n * q[:, t], axis=-1)), np.exp(-m)) + 1e-6
        out.append(np.einsum("bhkv,bhk->bhv", C, q[:, t]) / weight[..., None])
    expected = mlstm_output(p, x, np.stack(out, axis=1))
    assert_equal(apply(mixer, p, x), expected, tolerance=1e-3)


def test_mlstm_extreme_gates_leave_documents_apart_and_gradients_finite():
    mixer, p = extreme_mlstm()
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)
    x = jnp.asarray(inputs(), jnp.float32)
    ids = jnp.asarray([[1] * 5 + [2] * 6] * B, jnp.int32)

    @jax.jit
    def run(x):
        def loss(params, x):
            y, _ = mixer.apply({"params": params}, x, ids)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, mixer.apply({"params": params}, x[:, 5:])[0], grads

    y, alone, grads = run(x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(y[:, 5:], alone, rtol=1e-5, atol=1e-5)
    shouted, _, _ = run(x.at[:, :5].multiply(30.0))
    np.testing.assert_array_equal(shouted[:, 5:], y[:, 5:])


@pytest.mark.slow
def test_mlstm_gradient_is_that_of_the_form_without_stabiliser():
    mixer, _, p = make("mlstm", input_gate_bias=0.0)
    p["i"]["kernel"] *= 5
    x = inputs()
    probe = np.random.default_rng(2).standard_normal((B, T, D))
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)

    def loss(params):
        y, _ = mixer.apply({"params": params}, jnp.asarray(x, jnp.float32))
        return jnp.sum(y * jnp.asarray(probe, jnp.float32))

    actual = jax.jit(jax.grad(loss))(params)

    def plain(p):
        heads = lambda name: (x @ p[name]["kernel"]).reshape(B, T, H, -1)  # noqa: E731
        gate = lambda name: 15 * jnp.tanh((x @ p[name]["kernel"] + p[name]["bias"]) / 15)  # noqa: E731
        log_f = jnp.cumsum(jax.nn.log_sigmoid(gate("f")), axis=1)
        log_w = log_f[:, :, None] - log_f[:, None] + gate("i")[:, None]
        log_w = jnp.where(np.tri(T, dtype=bool)[None, :, :, None], log_w, -jnp.inf)
        weights = jnp.exp(log_w) * jnp.einsum("bthk,bshk->btsh", heads("q") / 2, heads("k"))
        floor = jnp.maximum(jnp.abs(weights.sum(axis=2)), 1.0)[..., None]
        h = jnp.einsum("btsh,bshv->bthv", weights, heads("v")) / floor
        h = h - h.mean(axis=-1, keepdims=True)
        h = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)
        h = h * p["h_norm"]["scale"][None, None] * jax.nn.sigmoid(heads("g"))
        return jnp.sum((h.reshape(B, T, D) @ p["o"]["kernel"]) * probe)

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        expected = jax.jit(jax.grad(plain))(p)
        expected = jax.tree.map(np.asarray, expected)
    for (path, b), a in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        scale = np.sqrt(np.mean(b**2))
        assert np.abs(a - b).max() < 1e-3 * scale, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"input_gate": "relu"}, "input_gate is 'relu'; choose one of exp, sigmoid"),
        ({"normalize": False}, "exponential input gate needs normalize=True"),
        ({"num_heads": 5}, "num_heads 5 must divide"),
    ],
)
def test_mlstm_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        mixers.make("mlstm", d_model=D, **options).init_state(1)
