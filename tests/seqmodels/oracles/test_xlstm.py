"""xLSTM 7B's architecture, whole: logits of transformers' PyTorch model and of ours, from the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from seqmodels import language_model
from tests.seqmodels.oracles import weights

D, H, W, LAYERS = 64, 2, 97, 2
T = 70  # one chunk of theirs, and a rest that they do token by token


@pytest.fixture(scope="module")
def oracle():
    config = transformers.xLSTMConfig(
        vocab_size=W, hidden_size=D, num_hidden_layers=LAYERS, num_heads=H, use_cache=False
    )
    model = transformers.xLSTMForCausalLM(config).eval()
    weights.randomize(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)  # so that the cap at 30 is felt
        for block in model.backbone.blocks:
            block.mlstm_layer.igate_preact.bias.add_(10.0)  # from -10: both sides of max(|q.n|, 1)
            block.mlstm_layer.igate_preact.weight.mul_(8.0)  # up to the cap at 15
    return model


def block_params(block):
    layer, ffn = block.mlstm_layer, block.ffn
    modules = {"q": layer.q, "k": layer.k, "v": layer.v, "g": layer.ogate_preact}
    modules |= {"i": layer.igate_preact, "f": layer.fgate_preact, "o": layer.out_proj}
    mixer = {name: weights.linear(module) for name, module in modules.items()}
    mixer["h_norm"] = {"scale": weights.array(layer.multihead_norm.weight).reshape(H, -1)}
    channel = {"gate": ffn.proj_up_gate, "up": ffn.proj_up, "down": ffn.proj_down}
    return {
        "mixer_norm": weights.scale(block.norm_mlstm),
        "mixer": mixer,
        "channel_norm": weights.scale(block.norm_ffn),
        "channel_mixer": {name: weights.linear(module) for name, module in channel.items()},
    }


def test_logits(oracle):
    model = language_model.from_config(
        {
            "vocab_size": W,
            "d_model": D,
            "num_layers": LAYERS,
            "pattern": f"mlstm(num_heads={H})",
            "d_ff": oracle.backbone.blocks[0].ffn.up_proj_dim,
            "norm_eps": oracle.config.norm_eps,
            "tied_embeddings": False,
            "logit_softcap": 30.0,
            "scan_layers": False,
        }
    )
    backbone = oracle.backbone
    params = {f"block_{n}": block_params(block) for n, block in enumerate(backbone.blocks)}
    params["embed"] = {"embedding": weights.array(backbone.embeddings.weight)}
    params["final_norm"] = weights.scale(backbone.out_norm)
    params["output"] = weights.linear(oracle.lm_head)
    tokens_BT = np.random.default_rng(0).integers(0, W, (2, T))
    with torch.no_grad():
        expected_BTW = oracle(torch.as_tensor(tokens_BT)).logits.numpy()
    assert np.abs(expected_BTW).max() > 25
    logits_BTW, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-4 * expected_BTW.std())


def test_first_values_of_the_gates():
    config = transformers.xLSTMConfig(
        vocab_size=W, hidden_size=D, num_hidden_layers=1, num_heads=H, use_cache=False
    )
    theirs = block_params(transformers.xLSTMForCausalLM(config).backbone.blocks[0])["mixer"]
    model = language_model.from_config(
        {"vocab_size": W, "d_model": D, "num_layers": 1, "pattern": f"mlstm(num_heads={H})"}
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    for gate in "if":
        for name, ours in params["block_0"]["mixer"][gate].items():
            np.testing.assert_allclose(ours.unbox(), theirs[gate][name], err_msg=f"{gate} {name}")
