"""Frequencies of scaled rotary positions equal those that transformers computes."""

import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from seqmodels.checkpoints_io import architectures
from seqmodels.checkpoints_io.architectures import HFConfig
from seqmodels.modules import pattern, positions

SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def both(rope):
    """transformers' module, and the options that we read."""
    config = transformers.Qwen2Config(**SIZES, rope_parameters={"rope_theta": 1e5} | rope)
    model = architectures.get("qwen2").model_config(HFConfig(config.to_dict(), "config.json"))
    (spec,) = pattern.layers(model["pattern"], 1)
    return Qwen2RotaryEmbedding(config), dict(spec.options)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        YARN,
        YARN | {"attention_factor": 0.7},
        YARN | {"beta_fast": 8, "beta_slow": 2, "truncate": False},
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
        YARN | {"mscale": 0.7},
        {"rope_type": "yarn", "factor": 2.0},
        YARN | {"beta_fast": 1e-3, "beta_slow": 1e-4},
    ],
)
def test_frequencies(rope):
    theirs, options = both(rope)
    frequency_11K, amplitude = positions.frequencies(
        32, options["rope_base"], options["rope_scaling"]
    )
    np.testing.assert_allclose(frequency_11K[0, 0], theirs.inv_freq.numpy(), rtol=2e-5)
    assert amplitude == pytest.approx(theirs.attention_scaling)


def test_a_base_that_grows():
    """Token by token, as a decoder comes to them."""
    theirs, options = both({"rope_type": "dynamic", "factor": 2.0})
    x = torch.zeros(1)
    for t in (0, 40, 127, 128, 200, 500):
        cos, _ = theirs(x, torch.tensor([[t]]))
        position_BT = np.array([[t]])
        frequency_BTK, amplitude = positions.frequencies(
            32, options["rope_base"], options["rope_scaling"], position_BT
        )
        ours = amplitude * np.cos(t * np.asarray(frequency_BTK)).reshape(-1)
        np.testing.assert_allclose(ours, cos[0, 0, :16].numpy(), atol=2e-4)
