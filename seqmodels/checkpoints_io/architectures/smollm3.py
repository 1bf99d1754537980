"""SmolLM3 (Hugging Face, 2025): Llama whose every fourth layer has no positions (NoPE, arXiv
2501.18795).

SmolLM and SmolLM2 are Llama, and say so in their config.json.
"""

import dataclasses

from seqmodels.checkpoints_io.architectures import Architecture, decoder
from seqmodels.checkpoints_io.architectures.qwen2 import hf_config, with_layer_types


def _model_config(config):
    config = config.with_defaults(
        num_key_value_heads=4, max_position_embeddings=32_768, rope_theta=2e6
    )
    L = config.integer("num_hidden_layers")
    interval = config.integer("no_rope_layer_interval", 4)
    rotated = config.integers("no_rope_layers", L, [int((i + 1) % interval != 0) for i in range(L)])
    bias = config.flag("attention_bias", False)
    options = decoder.attention_options(config, use_bias=bias or None)
    typed = with_layer_types(config, lambda i: not rotated[i])
    specs = [
        spec if turns else _without_positions(spec)
        for spec, turns in zip(decoder.layers(typed, options), rotated)
    ]
    fields = {"channel_bias": True} if config.flag("mlp_bias", False) else {}
    return decoder.model_config(
        config, specs, tied_embeddings=config.flag("tie_word_embeddings", True), **fields
    )


def _without_positions(spec):
    options = dict(spec.options) | {"rope_base": None}
    options.pop("rope_scaling", None)
    return dataclasses.replace(spec, options=tuple(options.items()))


def _hf_config(model, specs):
    return hf_config(model, specs) | {
        "attention_bias": decoder.option_values(specs[0])["use_bias"],
        "mlp_bias": model["channel_bias"],
        "no_rope_layers": [int(decoder.option_values(s)["rope_base"] is not None) for s in specs],
    }


ARCHITECTURE = Architecture(
    model_type="smollm3",
    class_name="SmolLM3ForCausalLM",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=decoder.tensors,
    ignored=decoder.IGNORED,
)
