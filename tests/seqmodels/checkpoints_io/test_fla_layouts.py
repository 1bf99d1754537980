"""flash-linear-attention's layouts: names and shapes as its modules have them, logits by the
definitions in float64 NumPy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from scipy.special import expit, log_expit

from seqmodels import checkpoints_io
from tests.seqmodels.checkpoints_io import round_trip

D, H, F, W, L, T, TAPS = 32, 2, 40, 61, 3, 21, 4
EPS = 1e-3
COMMON = {
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_heads": H,
    "intermediate_size": F,
    "vocab_size": W,
    "norm_eps": EPS,
    "tie_word_embeddings": False,
    "hidden_act": "swish",
}


def silu(x):
    return x * expit(x)


def rms(x, gain, eps=EPS):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def rotate(x_THK, base=10_000.0):
    half = x_THK.shape[-1] // 2
    angle_TK = np.arange(len(x_THK))[:, None] * base ** (-np.arange(half) / half)
    turn = np.exp(1j * angle_TK)[:, None]
    z = (x_THK[..., :half] + 1j * x_THK[..., half:]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


def conv(x_TC, w_C1I):
    padded = np.pad(x_TC, ((TAPS - 1, 0), (0, 0)))
    return silu(sum(padded[i : i + len(x_TC)] * w_C1I[:, 0, i] for i in range(TAPS)))


def recurrence(q_THK, k_THK, v_THV, log_decay_THK, beta_TH=None):
    """S <- diag(a) S + k v^T; with beta the delta rule, on the decayed state."""
    S_HKV, o = np.zeros((*k_THK.shape[1:], v_THV.shape[-1])), []
    for t in range(len(q_THK)):
        S_HKV = np.exp(log_decay_THK[t])[..., None] * S_HKV
        write_HV = v_THV[t]
        if beta_TH is not None:
            write_HV = beta_TH[t][:, None] * (write_HV - np.einsum("hkv,hk->hv", S_HKV, k_THK[t]))
        S_HKV = S_HKV + k_THK[t][..., None] * write_HV[:, None]
        o.append(np.einsum("hkv,hk->hv", S_HKV, q_THK[t]))
    return np.stack(o)


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T


def heads(x, p, name, count=H):
    y = linear(x, p, f"{name}_proj")
    return y.reshape(len(x), count, -1)


def normed_gated(o_THV, x, p, norm):
    o_THV = rms(o_THV, p[f"{norm}.weight"])
    if "g_proj.weight" in p:
        o_THV = o_THV * silu(heads(x, p, "g", o_THV.shape[1]))
    return linear(o_THV.reshape(len(x), -1), p, "o_proj")


def gla(x, p, config, layer, tensors):
    gk = linear(linear(x, p, "gk_proj.0"), p, "gk_proj.1") + p["gk_proj.1.bias"]
    q, k, v = (heads(x, p, name) for name in "qkv")
    o = recurrence(q / np.sqrt(q.shape[-1]), k, v, log_expit(gk).reshape(q.shape) / 16)
    return normed_gated(o, x, p, "g_norm_swish_gate")


def retnet(x, p, config, layer, tensors):
    q, k, v = (heads(x, p, name) for name in "qkv")
    log_decay = np.log(1 - 2.0 ** (-5 - np.arange(H)))[None, :, None] + np.zeros_like(k)
    o = recurrence(rotate(q) / np.sqrt(q.shape[-1]), rotate(k), v, log_decay)
    return normed_gated(o, x, p, "g_norm_swish_gate")


def hgrn2(x, p, config, layer, tensors):
    share = np.exp(tensors["model.lower_bounds"])
    share = share / share.sum(axis=0)
    bound = (np.cumsum(share, axis=0) - share[0])[layer]
    count = D // config["expand_ratio"]
    g = bound + (1 - bound) * expit(linear(x, p, "f_proj"))
    q = silu(linear(x, p, "q_proj"))
    q, g = (z.reshape(len(x), count, -1) for z in (q, g))
    o = recurrence(q, 1 - g, heads(x, p, "i", count), np.log(g))
    o = rms(o.reshape(len(x), D), p["g_norm.weight"], 1e-5)
    return linear(o, p, "o_proj")


def delta(x, p, config, layer, tensors):
    """DeltaNet, and Gated DeltaNet where there is an A_log."""
    q, k, v = (conv(linear(x, p, f"{n}_proj"), p[f"{n}_conv1d.weight"]) for n in "qkv")
    q, k = (unit(z.reshape(len(x), H, -1)) for z in (q, k))
    value_heads = config.get("num_v_heads", H)
    q, k = (np.repeat(z, value_heads // H, axis=1) for z in (q, k))
    beta = expit(linear(x, p, "b_proj")) * (2 if config["allow_neg_eigval"] else 1)
    log_decay = np.zeros_like(k)
    if "A_log" in p:
        dt = np.logaddexp(0, linear(x, p, "a_proj") + p["dt_bias"])
        log_decay = log_decay - (np.exp(p["A_log"]) * dt)[..., None]
    v = v.reshape(len(x), value_heads, -1)
    o = recurrence(q / np.sqrt(q.shape[-1]), k, v, log_decay, beta)
    return normed_gated(o, x, p, "o_norm")


def softmax(x, p, attn):
    q, k, v = (heads(x, p, "q", 4), heads(x, p, "k", 2), heads(x, p, "v", 2))
    bias = {n: p[f"{n}_proj.bias"] for n in "qkv"}
    q, k, v = (z + bias[n].reshape(1, z.shape[1], -1) for n, z in (("q", q), ("k", k), ("v", v)))
    q, k = (rotate(z, attn["rope_theta"]) for z in (q, k))
    k, v = (np.repeat(z, 2, axis=1) for z in (k, v))
    scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])
    ahead = np.arange(len(x))[:, None] - np.arange(len(x))
    scores = np.where((ahead >= 0) & (ahead < attn["window_size"]), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return linear(np.einsum("hts,shv->thv", weights, v).reshape(len(x), -1), p, "o_proj")


def logits(tensors, config, mixer, tokens_T):
    tensors = {name: x.astype(np.float64) for name, x in tensors.items()}
    x = tensors["model.embeddings.weight"][tokens_T]
    for i in range(L):
        prefix = f"model.layers.{i}."
        p = {n.removeprefix(prefix): z for n, z in tensors.items() if n.startswith(prefix)}
        own = {n.removeprefix("attn."): z for n, z in p.items()}
        h = rms(x, p["attn_norm.weight"])
        attn = config.get("attn")
        if attn and i in attn["layers"]:
            x = x + softmax(h, own, attn)
        else:
            x = x + mixer(h, own, config, i, tensors)
        h = rms(x, p["mlp_norm.weight"])
        hidden = silu(linear(h, p, "mlp.gate_proj")) * linear(h, p, "mlp.up_proj")
        x = x + linear(hidden, p, "mlp.down_proj")
    return rms(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


def projections(**widths):
    return {
        f"{n}_proj.weight": (D, width) if n == "o" else (width, D) for n, width in widths.items()
    }


# model_type: (config, the mixer's tensors and their shapes, its definition)
FAMILIES = {
    "gla": (
        {
            "expand_k": 0.5,
            "expand_v": 1.0,
            "num_kv_heads": None,
            "attn": {
                "layers": [1],
                "num_heads": 4,
                "num_kv_heads": 2,
                "qkv_bias": True,
                "window_size": 6,
                "rope_theta": 500.0,
            },
        },
        projections(q=D // 2, k=D // 2, v=D, g=D, o=D)
        | {"gk_proj.0.weight": (16, D), "gk_proj.1.weight": (D // 2, 16)}
        | {"gk_proj.1.bias": (D // 2,), "g_norm_swish_gate.weight": (D // H,)},
        gla,
    ),
    "retnet": (
        {"expand_k": 0.5, "expand_v": 1.5},
        projections(q=D // 2, k=D // 2, v=48, g=48, o=48)
        | {"g_norm_swish_gate.weight": (48 // H,)},
        retnet,
    ),
    "hgrn2": (
        {"expand_ratio": 8, "num_heads": None},
        projections(q=D, f=D, i=D, o=D) | {"g_norm.weight": (D,)},
        hgrn2,
    ),
    "delta_net": (
        {"expand_k": 0.75, "expand_v": 1.0, "allow_neg_eigval": True},
        projections(q=24, k=24, v=D, b=H, o=D)
        | {"q_conv1d.weight": (24, 1, TAPS), "k_conv1d.weight": (24, 1, TAPS)}
        | {"v_conv1d.weight": (D, 1, TAPS), "o_norm.weight": (D // H,)},
        delta,
    ),
    "gated_deltanet": (
        {"head_dim": 8, "num_v_heads": 4, "expand_v": 1.5, "allow_neg_eigval": False},
        projections(q=16, k=16, v=48, a=4, b=4, g=48, o=48)
        | {"q_conv1d.weight": (16, 1, TAPS), "k_conv1d.weight": (16, 1, TAPS)}
        | {"v_conv1d.weight": (48, 1, TAPS), "o_norm.weight": (12,)}
        | {"A_log": (4,), "dt_bias": (4,)},
        delta,
    ),
}
SOFTMAX = {"q_proj.weight": (D, D), "k_proj.weight": (16, D), "v_proj.weight": (16, D)}
SOFTMAX |= {"q_proj.bias": (D,), "k_proj.bias": (16,), "v_proj.bias": (16,)}
SOFTMAX |= {"o_proj.weight": (D, D)}


def random_tensors(config, mixer_shapes):
    shapes = {"model.embeddings.weight": (W, D), "model.norm.weight": (D,)}
    shapes["lm_head.weight"] = (W, D)
    if config["model_type"] == "hgrn2":
        shapes["model.lower_bounds"] = (L, D)
    for i in range(L):
        of_layer = {"attn_norm.weight": (D,), "mlp_norm.weight": (D,)}
        of_layer |= {f"mlp.{n}_proj.weight": (F, D) for n in ("gate", "up")}
        of_layer["mlp.down_proj.weight"] = (D, F)
        softmax = i in (config.get("attn") or {}).get("layers", [])
        of_layer |= {f"attn.{n}": s for n, s in (SOFTMAX if softmax else mixer_shapes).items()}
        shapes |= {f"model.layers.{i}.{n}": s for n, s in of_layer.items()}
    rng = np.random.default_rng(0)

    def draw(name, shape):
        z = rng.standard_normal(shape).astype(np.float32)
        if "conv1d" in name:
            return z / 2
        if len(shape) > 1:
            return z / np.float32(np.sqrt(shape[-1]))
        return (1 if "norm" in name else 0) + z * np.float32(0.3)

    return {name: draw(name, shape) for name, shape in shapes.items()}


@pytest.mark.slow
def test_layout(tmp_path):
    check("gla", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"gla"}))
def test_other_layout(model_type, tmp_path):
    check(model_type, tmp_path)


def check(model_type, folder):
    own, shapes, mixer = FAMILIES[model_type]
    config = COMMON | {"model_type": model_type} | own
    tensors = random_tensors(config, shapes)
    theirs, ours = folder / "theirs", folder / "ours"
    theirs.mkdir()
    safetensors.numpy.save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    (theirs / "config.json").write_text(json.dumps(config))
    loaded = checkpoints_io.load_pretrained(theirs)
    tokens_BT = np.random.default_rng(1).integers(0, W, (2, T))
    expected_BTW = np.stack([logits(tensors, config, mixer, tokens_T) for tokens_T in tokens_BT])
    logits_BTW, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-4 * expected_BTW.std(), rtol=0)
    round_trip.check_steps(loaded, tokens_BT, logits_BTW)
    checkpoints_io.save_pretrained(
        ours,
        loaded.model_config,
        loaded.params,
        architecture=model_type,
        hf_config=loaded.hf_config,
    )
    round_trip.check_tensors(theirs, ours)
