"""Qwen3, dense (arXiv 2505.09388): RMS norm on the heads of q and k, no biases, a head dimension of
its own."""

from seqmodels.checkpoints_io.architectures import Architecture, decoder
from seqmodels.checkpoints_io.architectures.qwen2 import hf_config, layers


def _model_config(config):
    config = config.with_defaults(max_position_embeddings=32_768)
    options = decoder.attention_options(
        config,
        head_dim=config.integer("head_dim", 128),
        qk_norm=True,
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        use_bias=config.flag("attention_bias", False) or None,
    )
    return decoder.model_config(config, layers(config, options))


def _hf_config(model, specs):
    bias = decoder.option_values(specs[0])["use_bias"]
    return hf_config(model, specs) | {"attention_bias": bias}


ARCHITECTURE = Architecture(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=decoder.tensors,
    ignored=decoder.IGNORED,
)
