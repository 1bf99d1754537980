"""Griffin's recurrent block, in a RecurrentGemma of such layers alone: logits of both models.

Its MLP's biases, which our GEGLU has not, are zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from seqmodels import language_model
from tests.seqmodels.oracles import weights

D, E, H, F, W, LAYERS, T = 64, 64, 4, 40, 61, 2, 21


def unit_offset(norm):
    """Their gain is 1 + weight."""
    return {"scale": 1.0 + weights.array(norm.weight)}


def mixer_params(block):
    lru = block.rg_lru
    return {
        "x": weights.linear(block.linear_x),
        "g": weights.linear(block.linear_y),
        "o": weights.linear(block.linear_out),
        "x_conv": weights.short_conv(block.conv_1d),
        "r_kernel": weights.array(lru.recurrent_gate_weight),
        "r_bias": weights.array(lru.recurrent_gate_bias),
        "i_kernel": weights.array(lru.input_gate_weight),
        "i_bias": weights.array(lru.input_gate_bias),
        "Lambda": weights.array(lru.recurrent_param),
    }


def test_logits():
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=W,
        hidden_size=D,
        lru_width=E,
        intermediate_size=2 * F,
        num_attention_heads=H,
        num_hidden_layers=LAYERS,
        block_types=("recurrent",),
        use_cache=False,
    )
    oracle = transformers.RecurrentGemmaForCausalLM(config).eval()
    weights.randomize(oracle)
    params = {
        "embed": {"embedding": weights.array(oracle.model.embed_tokens.weight)},
        "final_norm": unit_offset(oracle.model.final_norm),
    }
    for n, layer in enumerate(oracle.model.layers):
        mlp = layer.mlp_block
        channel = {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
        with torch.no_grad():
            layer.temporal_block.rg_lru.recurrent_param.sub_(3.0)  # decays from 0.5 to 1
            for module in channel.values():
                module.bias.zero_()
        params[f"block_{n}"] = {
            "mixer_norm": unit_offset(layer.temporal_pre_norm),
            "mixer": mixer_params(layer.temporal_block),
            "channel_norm": unit_offset(layer.channel_pre_norm),
            "channel_mixer": {
                k: {"kernel": weights.linear(m)["kernel"]} for k, m in channel.items()
            },
        }
    model = language_model.from_config(
        {
            "vocab_size": W,
            "d_model": D,
            "num_layers": LAYERS,
            "pattern": f"rg_lru(num_heads={H}, lru_width={E})",
            "channel_mixer": "geglu",
            "d_ff": F,
            "norm_eps": config.rms_norm_eps,
            "embedding_scale": D**0.5,
            "logit_softcap": config.logits_soft_cap,
            "scan_layers": False,
        }
    )
    tokens_BT = np.random.default_rng(0).integers(0, W, (2, T))
    with torch.no_grad():
        expected_BTW = oracle(torch.as_tensor(tokens_BT)).logits.numpy()
    logits_BTW, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-4 * expected_BTW.std())
