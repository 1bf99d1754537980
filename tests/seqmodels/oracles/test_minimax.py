"""MiniMax-Text-01's architecture: lightning attention beside softmax attention, logits of the whole model.

Their residual starts after the norm: x = norm(x); x = x + f(x). That is our "post" layout seen from half a layer
later, so their first norm goes into our embedding, each further one into the norm before it, and our last block's
own norm has a gain of one before the final norm repeats it. Of the experts there is one: a SwiGLU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from seqmodels import language_model
from tests.seqmodels.oracles import weights

D, H, G, W, F = 64, 4, 2, 97, 48
T, BLOCK = 21, 8
TYPES = ["linear_attention", "full_attention", "linear_attention"]
LIGHTNING = (
    "transnormer_llm(num_heads=4, slopes='alibi', value_activation='silu', "
    "gate_activation='sigmoid', norm='rms_norm')"
)


def make_oracle():
    config = transformers.MiniMaxConfig(
        vocab_size=W,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=len(TYPES),
        num_attention_heads=H,
        num_key_value_heads=G,
        layer_types=TYPES,
        block_size=BLOCK,
        num_local_experts=1,
        num_experts_per_tok=1,
        use_cache=False,
    )
    model = transformers.MiniMaxForCausalLM(config).eval()
    weights.randomize(model)
    return model


def mixer_params(attention, kind):
    if kind == "full_attention":
        modules = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
        return {n: weights.linear(m) for n, m in (modules | {"o": attention.o_proj}).items()}
    # rows are (head, one of q k v, channel)
    qkv = weights.array(attention.qkv_proj.weight).reshape(H, 3, D // H, D)
    params = {name: {"kernel": qkv[:, i].reshape(D, D).T} for i, name in enumerate("qkv")}
    params["u"] = weights.linear(attention.output_gate)
    params["o"] = weights.linear(attention.out_proj)
    return params | {"o_norm": weights.scale(attention.norm)}


def convert(oracle):
    layers = list(oracle.model.layers)
    table_WD = weights.array(oracle.model.embed_tokens.weight)
    eps = oracle.config.rms_norm_eps
    table_WD = table_WD / np.sqrt(np.mean(table_WD**2, axis=-1, keepdims=True) + eps)
    params = {
        "embed": {"embedding": table_WD * weights.array(layers[0].input_layernorm.weight)},
        "final_norm": weights.scale(oracle.model.norm),
        "output": weights.linear(oracle.lm_head),
    }
    next_norms = [weights.scale(layer.input_layernorm) for layer in layers[1:]]
    next_norms.append({"scale": np.ones(D, np.float32)})
    for n, layer in enumerate(layers):
        experts = layer.mlp.experts
        gate_FD, up_FD = np.split(weights.array(experts.gate_up_proj)[0], 2)
        kernels = {"gate": gate_FD.T, "up": up_FD.T, "down": weights.array(experts.down_proj)[0].T}
        params[f"block_{n}"] = {
            "mixer": mixer_params(layer.self_attn, TYPES[n]),
            "mixer_norm": weights.scale(layer.post_attention_layernorm),
            "channel_mixer": {name: {"kernel": kernel} for name, kernel in kernels.items()},
            "channel_norm": next_norms[n],
        }
    return params


def test_logits():
    oracle = make_oracle()
    base = oracle.config.rope_parameters["rope_theta"]
    attention = f"attention(num_heads={H}, num_kv_heads={G}, rope_base={base}, max_length={T})"
    model = language_model.from_config(
        {
            "vocab_size": W,
            "d_model": D,
            "num_layers": len(TYPES),
            "pattern": f"{LIGHTNING} + {attention} + {LIGHTNING}",
            "d_ff": F,
            "norm_eps": oracle.config.rms_norm_eps,
            "norm_position": "post",
            "tied_embeddings": False,
            "scan_layers": False,
        }
    )
    tokens_BT = np.random.default_rng(0).integers(0, W, (2, T))
    with torch.no_grad():
        expected_BTW = oracle(torch.as_tensor(tokens_BT)).logits.numpy()
    logits_BTW, _ = jax.jit(model.apply)({"params": convert(oracle)}, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-4 * expected_BTW.std())
