"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): biases on q, k and v, and windows on the upper layers, if any."""

from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, decoder


def with_layer_types(config: HFConfig) -> HFConfig:
    """A config whose `layer_types` and `sliding_window` say what the older `use_sliding_window` and `max_window_layers` do."""
    L = config.integer("num_hidden_layers")
    used = config.flag("use_sliding_window", False)
    fields = dict(config.fields)
    if not config.get("layer_types"):
        full = config.get("max_window_layers", L) if used else L
        fields["layer_types"] = [
            "full_attention" if i < full else "sliding_attention" for i in range(L)
        ]
    elif not used:
        fields["layer_types"] = ["full_attention"] * L
    return HFConfig(fields, config.name)


def _model_config(config):
    options = decoder.attention_options(config, use_bias=True, o_bias=False)
    return decoder.model_config(config, decoder.layers(with_layer_types(config), options))


def hf_config(model, specs):
    """With the windows as Qwen's configs say them."""
    types = decoder.layer_types(specs)
    sliding = "sliding_attention" in types
    fields = {"layer_types": types, "use_sliding_window": sliding}
    return decoder.hf_config(model, specs, **fields)


ARCHITECTURE = Architecture(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    model_config=_model_config,
    hf_config=hf_config,
    rules=decoder.tensors,
    ignored=decoder.IGNORED,
)
