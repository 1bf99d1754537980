"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115) checkpoints: Llama with biases on q, k and v,
and windows on the upper layers, if any."""

from collections.abc import Callable
from typing import Any

from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, decoder
from seqmodels.modules.pattern import MixerSpec


def with_layer_types(config: HFConfig, slides: Callable[[int], bool]) -> HFConfig:
    """Returns a config.json whose `layer_types` alone determines which layers have windows.

    Without `use_sliding_window` none has; where layer_types is absent, layer i has if `slides(i)`.
    """
    L = config.integer("num_hidden_layers")
    used = config.flag("use_sliding_window", False) and config.get("sliding_window") is not None
    fields = dict(config.fields)
    if not used or not config.get("layer_types"):
        fields["layer_types"] = [
            "sliding_attention" if used and slides(i) else "full_attention" for i in range(L)
        ]
    return HFConfig(fields, config.name)


def layers(config: HFConfig, options: dict[str, Any]) -> list[MixerSpec]:
    """Returns every layer's MixerSpec: attention, with a window where config.json says so."""
    first = config.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise ValueError(f"{config.name}: max_window_layers is {first!r}; it must be a count")
    return decoder.layers(with_layer_types(config, lambda i: i >= first), options)


def hf_config(model, specs):
    """Returns config.json's fields; layers' windows are in layer_types and use_sliding_window."""
    fields = decoder.hf_config(model, specs)
    types = decoder.layer_types(specs)
    return fields | {"layer_types": types, "use_sliding_window": "sliding_attention" in types}


def _model_config(config):
    config = config.with_defaults(max_position_embeddings=32_768)
    options = decoder.attention_options(config, use_bias=True, o_bias=False)
    return decoder.model_config(config, layers(config, options))


ARCHITECTURE = Architecture("qwen2", "Qwen2ForCausalLM", _model_config, hf_config, decoder.tensors)
