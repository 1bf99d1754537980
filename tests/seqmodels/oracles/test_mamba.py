"""Mamba-1, whole: logits of transformers' PyTorch model and of ours, from the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from seqmodels import language_model
from tests.seqmodels.oracles import weights

D, K, R, W, LAYERS = 32, 4, 3, 61, 2
E, T = 2 * D, 21


def mixer_params(mixer):
    (x, z), (low, B, C) = (
        weights.split(weights.linear(module), widths).values()
        for module, widths in (
            (mixer.in_proj, {"x": E, "z": E}),
            (mixer.x_proj, {"r": R, "B": K, "C": K}),
        )
    )
    return {
        "x": x,
        "z": z,
        "x_conv": weights.short_conv(mixer.conv1d),
        "dt_low_rank": low,
        "B": B,
        "C": C,
        "dt": {"kernel": weights.array(mixer.dt_proj.weight).T},
        "dt_bias": weights.array(mixer.dt_proj.bias),
        "A_log": weights.array(mixer.A_log),
        "D": weights.array(mixer.D),
        "o": weights.linear(mixer.out_proj),
    }


def test_logits():
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=W,
        hidden_size=D,
        state_size=K,
        time_step_rank=R,
        num_hidden_layers=LAYERS,
        use_cache=False,
    )
    oracle = transformers.MambaForCausalLM(config).eval()
    weights.randomize(oracle)
    backbone = oracle.backbone
    params = {
        "embed": {"embedding": weights.array(backbone.embeddings.weight)},
        "final_norm": weights.scale(backbone.norm_f),
    }
    for n, block in enumerate(backbone.layers):
        mixer_norm = weights.scale(block.norm)
        params[f"block_{n}"] = {"mixer_norm": mixer_norm, "mixer": mixer_params(block.mixer)}
    model = language_model.from_config(
        {
            "vocab_size": W,
            "d_model": D,
            "num_layers": LAYERS,
            "pattern": f"mamba(d_state={K}, dt_rank={R}, chunk_size=8)",
            "channel_mixer": None,
            "norm_eps": config.layer_norm_epsilon,
            "scan_layers": False,
        }
    )
    tokens_BT = np.random.default_rng(0).integers(0, W, (2, T))
    with torch.no_grad():
        expected_BTW = oracle(torch.as_tensor(tokens_BT)).logits.numpy()
    logits_BTW, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-4 * expected_BTW.std())
