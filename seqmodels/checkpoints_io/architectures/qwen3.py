"""Dense Qwen3 (arXiv 2505.09388) checkpoints: Llama with RMS norms of q and k per head, and a head
dimension of its own."""

from seqmodels.checkpoints_io.architectures import Architecture, decoder, parts, qwen2


def _model_config(config):
    config = config.with_defaults(max_position_embeddings=32_768)
    options = decoder.attention_options(
        config,
        head_dim=128,
        qk_norm=True,
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        use_bias=config.flag("attention_bias", False) or None,
    )
    return decoder.model_config(config, qwen2.layers(config, options))


def _hf_config(model, specs):
    fields = qwen2.hf_config(model, specs)
    return fields | {"attention_bias": parts.option_values(specs[0])["use_bias"]}


ARCHITECTURE = Architecture("qwen3", "Qwen3ForCausalLM", _model_config, _hf_config, decoder.tensors)
