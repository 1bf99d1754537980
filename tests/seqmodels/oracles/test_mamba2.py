"""Mamba-2 with two groups, whole: logits of transformers' PyTorch model and of ours, from the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from seqmodels import language_model
from tests.seqmodels.oracles import weights

D, V, K, G, W, LAYERS = 32, 16, 8, 2, 61, 2
E, H, T, CHUNK = 2 * D, 4, 21, 8


def mixer_params(mixer):
    conv_widths = {"x_conv": E, "B_conv": G * K, "C_conv": G * K}
    widths = {"z": E, "x": E, "B": G * K, "C": G * K, "dt": H}
    params = weights.split(weights.linear(mixer.in_proj), widths)
    params |= weights.split(weights.short_conv(mixer.conv1d), conv_widths)
    params["decay"] = {n: weights.array(getattr(mixer, n)) for n in ("A_log", "dt_bias")}
    params["D"] = weights.array(mixer.D)
    params["o_norm"] = weights.scale(mixer.norm)
    return params | {"o": weights.linear(mixer.out_proj)}


def test_logits():
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=W,
        hidden_size=D,
        head_dim=V,
        num_heads=H,
        state_size=K,
        n_groups=G,
        num_hidden_layers=LAYERS,
        chunk_size=CHUNK,
        use_cache=False,
    )
    oracle = transformers.Mamba2ForCausalLM(config).eval()
    weights.randomize(oracle)
    backbone = oracle.backbone
    params = {
        "embed": {"embedding": weights.array(backbone.embeddings.weight)},
        "final_norm": weights.scale(backbone.norm_f),
        "output": weights.linear(oracle.lm_head),
    }
    for n, block in enumerate(backbone.layers):
        mixer_norm = weights.scale(block.norm)
        params[f"block_{n}"] = {"mixer_norm": mixer_norm, "mixer": mixer_params(block.mixer)}
    model = language_model.from_config(
        {
            "vocab_size": W,
            "d_model": D,
            "num_layers": LAYERS,
            "pattern": f"mamba2(head_dim={V}, d_state={K}, num_groups={G})",
            "channel_mixer": None,
            "norm_eps": config.layer_norm_epsilon,
            "tied_embeddings": False,
            "scan_layers": False,
        }
    )
    tokens_BT = np.random.default_rng(0).integers(0, W, (2, T))
    with torch.no_grad():
        expected_BTW = oracle(torch.as_tensor(tokens_BT)).logits.numpy()
    logits_BTW, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-4 * expected_BTW.std())
