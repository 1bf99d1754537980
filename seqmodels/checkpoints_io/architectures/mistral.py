"""Mistral 7B (arXiv 2310.06825) checkpoints: Llama with a window on all layers, or on none."""

from seqmodels.checkpoints_io.architectures import Architecture, decoder, parts


def _model_config(config):
    config = config.with_defaults(
        num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131_072
    )
    # As in transformers the window is that of all layers, whatever layer_types says.
    window = config.optional_integer("sliding_window")
    layer = parts.spec("attention", **decoder.attention_options(config, window=window))
    return decoder.model_config(config, [layer] * config.integer("num_hidden_layers"))


ARCHITECTURE = Architecture(
    "mistral", "MistralForCausalLM", _model_config, decoder.hf_config, decoder.tensors
)
