"""Linear-time families against transformers' PyTorch models: in, logits, decoding, out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from seqmodels import language_model
from tests.seqmodels.checkpoints_io import oracle_suite

W = 61
COMMON = {"vocab_size": W, "use_cache": False}


def mamba():
    config = transformers.MambaConfig(
        **COMMON, hidden_size=32, state_size=4, time_step_rank=3, num_hidden_layers=2, use_bias=True
    )
    return transformers.MambaForCausalLM(config), {}


def mamba2():
    config = transformers.Mamba2Config(
        **COMMON,
        hidden_size=32,
        head_dim=16,
        num_heads=4,
        state_size=8,
        n_groups=2,
        num_hidden_layers=2,
        chunk_size=8,
        use_bias=True,
        use_conv_bias=False,
        layer_norm_epsilon=1e-3,
    )
    return transformers.Mamba2ForCausalLM(config), {}


def bamba():
    config = transformers.BambaConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        attn_layer_indices=[1],
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=2,
        mamba_chunk_size=8,
        rms_norm_eps=1e-3,
    )
    return transformers.BambaForCausalLM(config), {}


def qwen3_next():
    config = transformers.Qwen3NextConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        mlp_only_layers=[2],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        rms_norm_eps=1e-3,
    )
    return transformers.Qwen3NextForCausalLM(config), {}


def minimax():
    config = transformers.MiniMaxConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_attention_heads=6,  # no power of two
        num_key_value_heads=2,
        head_dim=8,
        block_size=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        full_attn_alpha_factor=1.5,
        full_attn_beta_factor=0.5,
        linear_attn_alpha_factor=2.0,
        mlp_alpha_factor=3.5,
    )
    return transformers.MiniMaxForCausalLM(config), {}


def recurrent_gemma():
    config = transformers.RecurrentGemmaConfig(
        **COMMON,
        hidden_size=48,  # whose root is no bfloat16
        lru_width=56,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=1,
        attention_window_size=6,
        num_hidden_layers=4,
        rms_norm_eps=1e-3,
    )

    def adjust(oracle):
        for layer in oracle.model.layers:
            if hasattr(layer.temporal_block, "rg_lru"):
                layer.temporal_block.rg_lru.recurrent_param.sub_(3.0)  # decays from 0.5 to 1

    return transformers.RecurrentGemmaForCausalLM(config), {"adjust": adjust}


def xlstm():
    config = transformers.xLSTMConfig(
        **COMMON, hidden_size=64, num_hidden_layers=2, num_heads=2, ffn_proj_factor=1.2
    )

    def adjust(oracle):
        oracle.lm_head.weight.mul_(20.0)  # so that the cap at 30 is felt
        for block in oracle.backbone.blocks:
            block.mlstm_layer.igate_preact.bias.add_(10.0)  # from -10: both sides of max(|q.n|, 1)
            block.mlstm_layer.igate_preact.weight.mul_(8.0)  # up to the cap at 15

    # One chunk of theirs, and a rest that they do token by token.
    return transformers.xLSTMForCausalLM(config), {"adjust": adjust, "length": 70}


def check(family, folder):
    oracle, options = family()
    oracle_suite.check(oracle, folder, steps=True, **options)


@pytest.mark.parametrize("family", [bamba, qwen3_next], ids=lambda family: family.__name__)
def test_family(family, tmp_path):
    check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [mamba, mamba2, minimax, recurrent_gemma, xlstm], ids=lambda family: family.__name__
)
def test_other_family(family, tmp_path):
    check(family, tmp_path)


def test_first_values_of_xlstm_gates():
    oracle, _ = xlstm()
    theirs = oracle.backbone.blocks[0].mlstm_layer
    model = language_model.from_config(
        {"vocab_size": W, "d_model": 64, "num_layers": 1, "pattern": "mlstm(num_heads=2)"}
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    ours = nn.meta.unbox(params["block_0"]["mixer"])
    for name, gate in (("i", theirs.igate_preact), ("f", theirs.fgate_preact)):
        np.testing.assert_allclose(ours[name]["kernel"].T, gate.weight.detach(), err_msg=name)
        np.testing.assert_allclose(ours[name]["bias"], gate.bias.detach(), err_msg=name)
