"""Llama 1 to 3 (arXiv 2302.13971, 2307.09288, 2407.21783) checkpoints, and those of models built
like them: SmolLM, SmolLM2, TinyLlama."""

from seqmodels.checkpoints_io.architectures import Architecture, decoder, parts


def biases(config):
    """Reads attention_bias and mlp_bias; returns what they set, (options of the mixer `attention`,
    fields of config.model)."""
    attention = {"use_bias": True} if config.flag("attention_bias", False) else {}
    return attention, {"channel_bias": True} if config.flag("mlp_bias", False) else {}


def bias_fields(model, specs):
    """Returns config.json's flags `attention_bias` and `mlp_bias` of a model."""
    attention = parts.option_values(specs[0])["use_bias"]
    return {"attention_bias": attention, "mlp_bias": model["channel_bias"]}


def _model_config(config):
    own, fields = biases(config)
    layer = parts.spec("attention", **decoder.attention_options(config, **own))
    return decoder.model_config(config, [layer] * config.integer("num_hidden_layers"), **fields)


def _hf_config(model, specs):
    fields = decoder.hf_config(model, specs)
    del fields["sliding_window"]
    return fields | bias_fields(model, specs)


ARCHITECTURE = Architecture("llama", "LlamaForCausalLM", _model_config, _hf_config, decoder.tensors)
