"""Delta-rule mixers, Mamba, Mamba-2, RG-LRU, LRU and HGRN: each against its definition, written out
in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers
from seqmodels.mixers import rg_lru

D, T = 16, 11

# name, options, shape of every parameter.
DELTA_NET = {
    "q/kernel": (D, 16),
    "k/kernel": (D, 16),
    "v/kernel": (D, 16),
    "q_conv/kernel": (4, 16),
    "k_conv/kernel": (4, 16),
    "v_conv/kernel": (4, 16),
    "b/kernel": (D, 4),
    "o_norm/scale": (4,),
    "o/kernel": (16, D),
}
DELTA_PRODUCT = DELTA_NET | {
    "k/kernel": (D, 32),
    "v/kernel": (D, 32),
    "k_conv/kernel": (4, 32),
    "v_conv/kernel": (4, 32),
    "b/kernel": (D, 8),
}
DECAY = {"a/kernel": (D, 4), "decay/A_log": (4,), "decay/dt_bias": (4,)}
GATED_DELTA_NET = {
    "q/kernel": (D, 12),
    "k/kernel": (D, 12),
    "v/kernel": (D, 24),
    "g/kernel": (D, 24),
    "q_conv/kernel": (4, 12),
    "k_conv/kernel": (4, 12),
    "v_conv/kernel": (4, 24),
    "b/kernel": (D, 4),
    "o_norm/scale": (6,),
    "o/kernel": (24, D),
    **DECAY,
}
MAMBA2 = {
    "z/kernel": (D, 32),
    "x/kernel": (D, 32),
    "B/kernel": (D, 10),
    "C/kernel": (D, 10),
    "dt/kernel": (D, 4),
    "x_conv/kernel": (4, 32),
    "x_conv/bias": (32,),
    "B_conv/kernel": (4, 10),
    "B_conv/bias": (10,),
    "C_conv/kernel": (4, 10),
    "C_conv/bias": (10,),
    "decay/A_log": (4,),
    "decay/dt_bias": (4,),
    "D": (4,),
    "o_norm/scale": (32,),
    "o/kernel": (32, D),
}
MAMBA = {
    "x/kernel": (D, 32),
    "z/kernel": (D, 32),
    "x_conv/kernel": (4, 32),
    "x_conv/bias": (32,),
    "dt_low_rank/kernel": (32, 1),
    "B/kernel": (32, 5),
    "C/kernel": (32, 5),
    "dt/kernel": (1, 32),
    "dt_bias": (32,),
    "A_log": (32, 5),
    "D": (32,),
    "o/kernel": (32, D),
}
RG_LRU = {
    "x/kernel": (D, 24),
    "x/bias": (24,),
    "g/kernel": (D, 24),
    "g/bias": (24,),
    "x_conv/kernel": (4, 24),
    "x_conv/bias": (24,),
    "r_kernel": (4, 6, 6),
    "r_bias": (4, 6),
    "i_kernel": (4, 6, 6),
    "i_bias": (4, 6),
    "Lambda": (24,),
    "o/kernel": (24, D),
    "o/bias": (D,),
}
LRU = {name: (7,) for name in ("nu_log", "theta_log", "gamma_log")}
LRU |= {"B_re/kernel": (D, 7), "B_im/kernel": (D, 7)}
LRU |= {"C_re/kernel": (7, D), "C_im/kernel": (7, D), "D": (D,)}
HGRN = {f"{name}/kernel": (D, D) for name in "figo"} | {"o_norm/scale": (D,)}

CASES = {
    "delta_net": ("delta_net", {}, DELTA_NET),
    "delta_net, reflections and gate": (
        "delta_net",
        {"allow_neg_eigval": True, "use_gate": True, "expand_v": 2.0},
        DELTA_NET
        | {"v/kernel": (D, 32), "v_conv/kernel": (4, 32), "g/kernel": (D, 32)}
        | {"o_norm/scale": (8,), "o/kernel": (32, D)},
    ),
    "delta_net, no convolution": (
        "delta_net",
        {"conv_width": None},
        {k: v for k, v in DELTA_NET.items() if "conv" not in k},
    ),
    "gated_delta_net": ("gated_delta_net", {}, GATED_DELTA_NET),
    "delta_product": ("delta_product", {}, DELTA_PRODUCT),
    "delta_product, gated": ("delta_product", {"use_forget_gate": True}, DELTA_PRODUCT | DECAY),
    "mamba2": ("mamba2", {"head_dim": 8, "d_state": 5, "num_groups": 2}, MAMBA2),
    "mamba": ("mamba", {"d_state": 5, "chunk_size": 4}, MAMBA),
    "mamba, negative": ("mamba", {"d_state": 5, "negative_eigenvalues": True}, MAMBA),
    "rg_lru": ("rg_lru", {"lru_width": 24}, RG_LRU),
    "lru": ("lru", {"d_state": 7}, LRU),
    "hgrn": ("hgrn", {}, HGRN),
}


def initial_params(name, options, d_model=D, seed=0):
    mixer = mixers.make(name, d_model=d_model, **options)
    return nn.unbox(jax.jit(mixer.init)(jax.random.key(seed), jnp.zeros((1, 1, d_model))))["params"]


def flat(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def conv(p, name, x_TD):
    """Returns sum_i w_i x_{t-3+i} + bias."""
    if f"{name}/kernel" not in p:
        return x_TD
    padded = np.concatenate([np.zeros((3, x_TD.shape[1])), x_TD])
    taps = [w_D * padded[i : i + len(x_TD)] for i, w_D in enumerate(p[f"{name}/kernel"])]
    return sum(taps) + p.get(f"{name}/bias", 0.0)


def rms_norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def delta_rule_mixer(p, u_TD, *, H=4, n=1, beta_max=1.0):
    """Computes the three delta mixers with I - beta k k^T as a matrix, n of them per token."""
    q, k, v = (
        silu(conv(p, f"{name}_conv", u_TD @ p[f"{name}/kernel"])).reshape(T, copies, H, -1)
        for name, copies in (("q", 1), ("k", n), ("v", n))
    )
    q, k = (x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    beta = beta_max * sigmoid(u_TD @ p["b/kernel"]).reshape(T, n, H)
    alpha_TH = np.ones((T, H))
    if "decay/A_log" in p:
        dt_TH = softplus(u_TD @ p["a/kernel"] + p["decay/dt_bias"])
        alpha_TH = np.exp(-np.exp(p["decay/A_log"]) * dt_TH)
    K, V = k.shape[-1], v.shape[-1]
    o_THV = np.zeros((T, H, V))
    for h in range(H):
        S_KV = np.zeros((K, V))
        for t in range(T):
            S_KV = alpha_TH[t, h] * S_KV
            for j in range(n):
                k_K, v_V, b = k[t, j, h], v[t, j, h], beta[t, j, h]
                S_KV = (np.eye(K) - b * np.outer(k_K, k_K)) @ S_KV + b * np.outer(k_K, v_V)
            o_THV[t, h] = S_KV.T @ q[t, 0, h] / np.sqrt(K)
    o_THV = rms_norm(o_THV) * p["o_norm/scale"]
    if "g/kernel" in p:
        o_THV = o_THV * silu(u_TD @ p["g/kernel"]).reshape(T, H, V)
    return o_THV.reshape(T, -1) @ p["o/kernel"]


def mamba2(p, u_TD, H=4, V=8, G=2):
    x_THV, B_TGK, C_TGK = (
        silu(conv(p, f"{name}_conv", u_TD @ p[f"{name}/kernel"])).reshape(T, heads, -1)
        for name, heads in (("x", H), ("B", G), ("C", G))
    )
    dt_TH = softplus(u_TD @ p["dt/kernel"] + p["decay/dt_bias"])
    A_H = -np.exp(p["decay/A_log"])
    o_THV = np.zeros((T, H, V))
    for h in range(H):
        g, S_KV = h // (H // G), 0.0
        for t in range(T):
            write_KV = dt_TH[t, h] * np.outer(B_TGK[t, g], x_THV[t, h])
            S_KV = np.exp(dt_TH[t, h] * A_H[h]) * S_KV + write_KV
            o_THV[t, h] = C_TGK[t, g] @ S_KV + p["D"][h] * x_THV[t, h]
    o = o_THV.reshape(T, -1) * silu(u_TD @ p["z/kernel"])
    o = rms_norm(o.reshape(T, G, -1)).reshape(T, -1) * p["o_norm/scale"]
    return o @ p["o/kernel"]


def mamba(p, u_TD, negative=False):
    x_TE = silu(conv(p, "x_conv", u_TD @ p["x/kernel"]))
    B_TK, C_TK = x_TE @ p["B/kernel"], x_TE @ p["C/kernel"]
    dt_TE = softplus(x_TE @ p["dt_low_rank/kernel"] @ p["dt/kernel"] + p["dt_bias"])
    h_EK, o_TE = 0.0, np.zeros_like(x_TE)
    for t in range(T):
        s_EK = np.exp(-dt_TE[t][:, None] * np.exp(p["A_log"]))
        s_EK = 2.0 * s_EK - 1.0 if negative else s_EK
        h_EK = s_EK * h_EK + (dt_TE[t] * x_TE[t])[:, None] * B_TK[t][None]
        o_TE[t] = h_EK @ C_TK[t] + p["D"] * x_TE[t]
    return (o_TE * silu(u_TD @ p["z/kernel"])) @ p["o/kernel"]


def griffin(p, u_TD, H=4):
    x_TE = conv(p, "x_conv", u_TD @ p["x/kernel"] + p["x/bias"])

    def gate(name):
        y_THV = np.einsum("thk,hkv->thv", x_TE.reshape(T, H, -1), p[f"{name}_kernel"])
        return sigmoid(y_THV + p[f"{name}_bias"]).reshape(T, -1)

    a_TE = np.exp(-8.0 * softplus(p["Lambda"]) * gate("r"))
    h_E, h_TE = 0.0, np.zeros_like(x_TE)
    for t in range(T):
        scale_E = np.sqrt(1.0 - a_TE[t] ** 2) if t else 1.0
        h_TE[t] = h_E = a_TE[t] * h_E + scale_E * gate("i")[t] * x_TE[t]
    g_TE = u_TD @ p["g/kernel"] + p["g/bias"]
    gelu_TE = 0.5 * g_TE * (1 + np.tanh(np.sqrt(2 / np.pi) * (g_TE + 0.044715 * g_TE**3)))
    return (h_TE * gelu_TE) @ p["o/kernel"] + p["o/bias"]


def lru(p, u_TD):
    lambda_K = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    B_DK, C_KD = (p[f"{x}_re/kernel"] + 1j * p[f"{x}_im/kernel"] for x in "BC")
    h_K, y_TD = 0.0, np.zeros((T, D))
    for t in range(T):
        h_K = lambda_K * h_K + np.exp(p["gamma_log"]) * (u_TD[t] @ B_DK)
        y_TD[t] = (h_K @ C_KD).real + p["D"] * u_TD[t]
    return y_TD


def hgrn(p, u_TD, bound_D):
    f_TD = bound_D + (1.0 - bound_D) * sigmoid(u_TD @ p["f/kernel"])
    h_D, h_TD = 0.0, np.zeros((T, D))
    for t in range(T):
        h_TD[t] = h_D = f_TD[t] * h_D + (1.0 - f_TD[t]) * silu(u_TD[t] @ p["i/kernel"])
    gated_TD = rms_norm(h_TD) * p["o_norm/scale"] * silu(u_TD @ p["g/kernel"])
    return gated_TD @ p["o/kernel"]


LOWER_BOUND_D = np.linspace(0.0, 0.9, D)
RECURRENCES = {
    "delta_net": delta_rule_mixer,
    "delta_net, reflections and gate": lambda p, u: delta_rule_mixer(p, u, beta_max=2.0),
    "delta_net, no convolution": delta_rule_mixer,
    "gated_delta_net": delta_rule_mixer,
    "delta_product": lambda p, u: delta_rule_mixer(p, u, n=2, beta_max=2.0),
    "delta_product, gated": lambda p, u: delta_rule_mixer(p, u, n=2, beta_max=2.0),
    "mamba2": mamba2,
    "mamba": mamba,
    "mamba, negative": lambda p, u: mamba(p, u, negative=True),
    "rg_lru": griffin,
    "lru": lru,
    "hgrn": lambda p, u: hgrn(p, u, LOWER_BOUND_D),
}


@pytest.mark.parametrize("case", CASES)
def test_definition(case):
    """Asserts the parameters' shapes, and the output of the recurrence written out."""
    name, options, shapes = CASES[case]
    params = initial_params(name, options)
    assert {k: x.shape for k, x in flat(params).items()} == shapes
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(p.dtype), params)
    u_TD = rng.standard_normal((T, D))
    layer = mixers.Layer(1, 2, jnp.asarray(LOWER_BOUND_D, jnp.float32))
    mixer = mixers.make(name, d_model=D, **options)
    apply = jax.jit(lambda params, x: mixer.apply({"params": params}, x, layer=layer)[0])
    found_TD = np.asarray(apply(params, jnp.asarray(u_TD[None], jnp.float32)))[0]
    p = {k: x.astype(np.float64) for k, x in flat(params).items()}
    expected_TD = RECURRENCES[case](p, u_TD)
    np.testing.assert_allclose(found_TD, expected_TD, rtol=0, atol=1e-4 * expected_TD.std())


def test_mamba2_has_the_published_width():
    """At 130M, D 768 has 24 heads of 64, 2 D^2 for x and z each, D E for the output, one group."""
    mixer = mixers.make("mamba2", d_model=768)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 1, 768)))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    inputs, conv_channels = 768 * (2 * 1536 + 2 * 128 + 24), 1536 + 2 * 128
    assert count == inputs + 5 * conv_channels + 3 * 24 + 1536 + 1536 * 768


def in_range(x, low, high, spread=0.8):
    """Asserts that all values lie within [low, high], and over most of it."""
    x = np.asarray(x)
    assert x.min() >= low and x.max() <= high
    assert x.max() - x.min() > spread * (high - low)


@pytest.mark.parametrize(
    "name, options, A_range",
    [
        ("mamba2", {"head_dim": 1, "d_state": 2}, (1, 16)),
        ("gated_delta_net", {"num_heads": 128, "head_dim": 1}, (0, 16)),
    ],
)
def test_initial_decay(name, options, A_range):
    p = flat(initial_params(name, options, d_model=64))
    in_range(np.exp(p["decay/A_log"]), *A_range)
    dt = softplus(p["decay/dt_bias"].astype(np.float64))
    in_range(np.log(dt), np.log(0.999e-3), np.log(0.1001))
    if name == "mamba2":
        assert np.all(p["D"] == 1.0)
        in_range(p["x_conv/kernel"], -0.5, 0.5)


def test_initial_values_of_mamba():
    p = flat(initial_params("mamba", {}, d_model=64))
    np.testing.assert_allclose(
        np.exp(p["A_log"]), np.tile(np.arange(1.0, 17.0), (128, 1)), rtol=1e-6
    )
    in_range(np.log(softplus(p["dt_bias"].astype(np.float64))), np.log(0.999e-3), np.log(0.1001))
    in_range(p["dt/kernel"], -0.5, 0.5)  # rank 4
    assert np.all(p["D"] == 1.0)


def test_initial_values_of_rg_lru():
    p = flat(initial_params("rg_lru", {}, d_model=256))
    in_range(np.exp(-8.0 * softplus(p["Lambda"].astype(np.float64))), 0.8999, 0.9991)
    assert abs(p["r_kernel"].std() * np.sqrt(64) - 1.0) < 0.05  # fan-in is a block's
    assert not p["r_bias"].any() and not p["o/bias"].any()


def test_initial_values_of_lru():
    p = flat(initial_params("lru", {"r_min": 0.4, "r_max": 0.9, "max_phase": 3.0}, d_model=256))
    radius = np.exp(-np.exp(p["nu_log"]))
    in_range(radius, 0.3999, 0.9001)
    # uniform over the ring's area: the mean of the squared radius lies midway
    assert abs(np.mean(radius**2) - (0.4**2 + 0.9**2) / 2) < 0.04
    in_range(np.exp(p["theta_log"]), 0.0, 3.0)
    np.testing.assert_allclose(np.exp(p["gamma_log"]), np.sqrt(1 - radius**2), rtol=1e-5)
    for name, std in (("B_re", 512**-0.5), ("C_im", 256**-0.5)):
        assert abs(p[f"{name}/kernel"].std() / std - 1.0) < 0.03


def test_sqrt_has_a_bounded_gradient():
    x = jnp.array([0.0, 1e-12, 0.04])
    np.testing.assert_allclose(rg_lru.sqrt_bounded_gradient(x), jnp.sqrt(x))
    gradient = jax.vmap(jax.grad(rg_lru.sqrt_bounded_gradient))(x)
    np.testing.assert_allclose(gradient, [1000.0, 1000.0, 2.5], rtol=1e-5)


def test_rg_lru_keeps_1_minus_a_squared_where_a_rounds_to_1():
    """a = exp(-1e-9) is 1 in float32, yet sqrt(1 - a^2) is 4.5e-5."""
    mixer = mixers.make("rg_lru", d_model=4, num_heads=1)
    params = initial_params("rg_lru", {"num_heads": 1}, d_model=4)
    params["Lambda"] = jnp.full((4,), np.log(np.expm1(2e-9 / 8)), jnp.float32)  # r is 1/2
    params["r_kernel"] = jnp.zeros_like(params["r_kernel"])
    state = mixer.init_state(1).replace(begun_B=jnp.ones((1,), bool))
    _, state = mixer.apply({"params": params}, jnp.ones((1, 1, 4)), None, state)
    _, first = mixer.apply({"params": params}, jnp.ones((1, 1, 4)))
    np.testing.assert_allclose(state.h_BE / first.h_BE, np.sqrt(2e-9), rtol=1e-4)


def test_mamba_keeps_one_chunk_of_states():
    """The scan's backward pass makes no array of (T, E, K) values."""
    length, E, K = 256, 64, 8
    mixer = mixers.make("mamba", d_model=E // 2, d_state=K, chunk_size=16)
    x = jax.ShapeDtypeStruct((1, length, E // 2), jnp.float32)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(mixer.apply(params, x)[0])

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    largest = max(sizes(jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr))
    assert largest < length * E * K / 2


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("delta_net", {"num_heads": 4, "num_v_heads": 6}, "num_heads 4 must divide num_v_heads 6"),
        ("delta_net", {"num_heads": 32}, "set head_dim or expand_v"),
        ("delta_product", {"num_householder": 0}, "at least 1; got 0"),
        ("mamba2", {"head_dim": 5}, "head_dim 5 must divide expand . d_model = 32"),
        ("mamba2", {"head_dim": 8, "num_groups": 3}, "num_groups 3 must divide the 4 heads"),
        ("rg_lru", {"num_heads": 3}, "num_heads 3 must divide lru_width 16"),
        ("lru", {"r_min": 0.9, "r_max": 0.5}, "r_min 0.9, r_max 0.5"),
    ],
)
def test_wrong_sizes(name, options, message):
    with pytest.raises(ValueError, match=message):
        mixers.make(name, d_model=D, **options).init_state(1)
