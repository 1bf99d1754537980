"""Mistral 7B (arXiv 2310.06825): Llama with a sliding window on every layer, or on none."""

from seqmodels.checkpoints_io.architectures import Architecture, decoder


def _model_config(config):
    config = config.with_defaults(
        num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131_072
    )
    window = config.optional_integer("sliding_window")  # of all layers, whatever layer_types says
    options = decoder.attention_options(config, window=window)
    specs = [decoder.spec(**options)] * config.integer("num_hidden_layers")
    return decoder.model_config(config, specs)


ARCHITECTURE = Architecture(
    model_type="mistral",
    class_name="MistralForCausalLM",
    model_config=_model_config,
    hf_config=decoder.hf_config,
    rules=decoder.tensors,
    ignored=decoder.IGNORED,
)
