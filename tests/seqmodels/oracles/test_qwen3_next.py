"""Gated DeltaNet with shared key heads, in a Qwen3-Next of such layers alone: logits of both models."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from seqmodels import language_model
from tests.seqmodels.oracles import weights

D, G, H, K, V, F, W, LAYERS, T = 32, 2, 4, 8, 12, 40, 61, 2, 70


def unit_offset(norm):
    """Their gain is 1 + weight."""
    return {"scale": 1.0 + weights.array(norm.weight)}


def mixer_params(mixer):
    # Rows of the projections are (key head, [q, k, v of its value heads, z of them]) and (key head, [b, a]).
    qkvz = weights.array(mixer.in_proj_qkvz.weight).reshape(G, -1, D)
    ba = weights.array(mixer.in_proj_ba.weight).reshape(G, 2, -1, D)
    value = H // G * V
    rows = dict(zip("qkvg", np.split(qkvz, np.cumsum([K, K, value]), axis=1)))
    rows |= {"b": ba[:, 0], "a": ba[:, 1]}
    params = {name: {"kernel": x.reshape(-1, D).T} for name, x in rows.items()}
    conv_widths = {"q_conv": G * K, "k_conv": G * K, "v_conv": H * V}
    params |= weights.split(weights.short_conv(mixer.conv1d), conv_widths)
    params["decay"] = {n: weights.array(getattr(mixer, n)) for n in ("A_log", "dt_bias")}
    params["o_norm"] = weights.scale(mixer.norm)
    return params | {"o": weights.linear(mixer.out_proj)}


def test_logits(monkeypatch):
    # Their recurrence is closer to ours than their chunked form is to it (float32, 70 tokens).
    modeling = transformers.models.qwen3_next.modeling_qwen3_next
    recurrent = modeling.torch_recurrent_gated_delta_rule
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", recurrent)
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=W,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=LAYERS,
        layer_types=["linear_attention"] * LAYERS,
        mlp_only_layers=list(range(LAYERS)),
        linear_num_key_heads=G,
        linear_num_value_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=1,
        num_experts_per_tok=1,
        rms_norm_eps=1e-5,
        use_cache=False,
    )
    oracle = transformers.Qwen3NextForCausalLM(config).eval()
    weights.randomize(oracle)
    params = {
        "embed": {"embedding": weights.array(oracle.model.embed_tokens.weight)},
        "final_norm": unit_offset(oracle.model.norm),
        "output": weights.linear(oracle.lm_head),
    }
    for n, layer in enumerate(oracle.model.layers):
        channel = {
            "gate": layer.mlp.gate_proj,
            "up": layer.mlp.up_proj,
            "down": layer.mlp.down_proj,
        }
        params[f"block_{n}"] = {
            "mixer_norm": unit_offset(layer.input_layernorm),
            "mixer": mixer_params(layer.linear_attn),
            "channel_norm": unit_offset(layer.post_attention_layernorm),
            "channel_mixer": {name: weights.linear(module) for name, module in channel.items()},
        }
    mixer = f"gated_delta_net(num_heads={G}, num_v_heads={H}, head_dim={K}, expand_v={V / K})"
    model = language_model.from_config(
        {
            "vocab_size": W,
            "d_model": D,
            "num_layers": LAYERS,
            "pattern": mixer,
            "d_ff": F,
            "norm_eps": config.rms_norm_eps,
            "tied_embeddings": False,
            "scan_layers": False,
        }
    )
    tokens_BT = np.random.default_rng(0).integers(0, W, (2, T))
    with torch.no_grad():
        expected_BTW = oracle(torch.as_tensor(tokens_BT)).logits.numpy()
    logits_BTW, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-4 * expected_BTW.std())
