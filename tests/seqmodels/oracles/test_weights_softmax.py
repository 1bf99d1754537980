"""Softmax families in and out: llama, mistral, qwen2, qwen3, smollm3, gpt2."""

import jax
import numpy as np
import transformers

from seqmodels import checkpoints_io
from tests.seqmodels.checkpoints_io import oracle_suite, round_trip

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make(kind, **options):
    config = getattr(transformers, f"{kind}Config")(**(SIZES | options))
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def test_llama(tmp_path):
    oracle = make("Llama", tie_word_embeddings=True, rms_norm_eps=1e-5)
    loaded = oracle_suite.check(oracle, tmp_path)
    assert loaded.hf_config["bos_token_id"] == 1
    assert loaded.model.plan.repeats == SIZES["num_hidden_layers"]


def test_llama_with_every_option(tmp_path):
    options = {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}
    loaded = oracle_suite.check(make("Llama", **options), tmp_path)
    assert "rope_scaling=('llama3', 8.0, 1.0, 4.0, 16" in loaded.model_config["pattern"]


def test_mistral(tmp_path):
    oracle_suite.check(make("Mistral", head_dim=8, sliding_window=5), tmp_path)


def test_qwen2(tmp_path):
    options = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    loaded = oracle_suite.check(make("Qwen2", **options), tmp_path)
    assert [dict(s.options).get("window") for s in loaded.model.mixers] == [None, None, 6]


def test_qwen3(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    options = {"head_dim": 16, "rope_parameters": yarn, "tie_word_embeddings": True}
    oracle_suite.check(make("Qwen3", **options), tmp_path)


def test_smollm3(tmp_path):
    oracle_suite.check(make("SmolLM3", no_rope_layer_interval=2), tmp_path)


def test_gpt2(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        reorder_and_upcast_attn=True,
        bos_token_id=1,
        eos_token_id=1,
    )
    oracle_suite.check(transformers.GPT2LMHeadModel(config), tmp_path)


def test_shards_that_transformers_wrote_and_names_without_the_head(tmp_path):
    oracle = make("Llama", tie_word_embeddings=True)
    oracle.save_pretrained(tmp_path / "sharded", max_shard_size="9KB")
    oracle.model.save_pretrained(tmp_path / "headless")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    sharded, headless = (
        checkpoints_io.load_pretrained(tmp_path / name) for name in ("sharded", "headless")
    )
    np.testing.assert_array_equal(
        sharded.params["embed"]["embedding"], oracle.lm_head.weight.detach().numpy()
    )
    jax.tree.map(np.testing.assert_array_equal, sharded.params, headless.params)


def test_bfloat16_comes_out_as_it_went_in(tmp_path):
    make("Qwen3", head_dim=16).bfloat16().save_pretrained(tmp_path / "theirs")
    loaded = round_trip.check_bytes(tmp_path / "theirs", tmp_path / "ours", "qwen3")
    assert loaded.model_config["dtype"] == "bfloat16"
