"""Llama 1 to 3 (arXiv 2302.13971, 2307.09288, 2407.21783), and what is built like them: SmolLM,
SmolLM2, TinyLlama."""

from seqmodels.checkpoints_io.architectures import Architecture, decoder


def _model_config(config):
    bias = config.flag("attention_bias", False)
    options = decoder.attention_options(config, use_bias=bias or None)
    specs = [decoder.spec(**options)] * config.integer("num_hidden_layers")
    fields = {"channel_bias": True} if config.flag("mlp_bias", False) else {}
    return decoder.model_config(config, specs, **fields)


def _hf_config(model, specs):
    fields = decoder.hf_config(model, specs)
    del fields["sliding_window"]
    return fields | {
        "attention_bias": decoder.option_values(specs[0])["use_bias"],
        "mlp_bias": model["channel_bias"],
    }


ARCHITECTURE = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=decoder.tensors,
    ignored=decoder.IGNORED,
)
