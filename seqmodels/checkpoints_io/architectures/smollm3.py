"""SmolLM3 (Hugging Face, 2025) checkpoints: Llama without positions in every fourth layer (NoPE,
arXiv 2501.18795).

SmolLM and SmolLM2 are Llama, and their config.json has that model_type.
"""

import dataclasses

from seqmodels.checkpoints_io.architectures import Architecture, decoder, llama, parts, qwen2


def _model_config(config):
    config = config.with_defaults(
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        rope_theta=2e6,
        tie_word_embeddings=True,
    )
    L = config.integer("num_hidden_layers")
    interval = config.integer("no_rope_layer_interval", 4)
    default = [int((i + 1) % interval != 0) for i in range(L)]
    rotated = config.listed("no_rope_layers", int, default, L)  # 1 where there are positions
    own, fields = llama.biases(config)
    options = decoder.attention_options(config, **own)
    typed = qwen2.with_layer_types(config, lambda i: not rotated[i])
    specs = [
        spec if turns else _without_positions(spec)
        for spec, turns in zip(decoder.layers(typed, options), rotated)
    ]
    return decoder.model_config(config, specs, **fields)


def _without_positions(spec):
    options = dict(spec.options) | {"rope_base": None}
    options.pop("rope_scaling", None)
    return dataclasses.replace(spec, options=tuple(options.items()))


def _hf_config(model, specs):
    fields = qwen2.hf_config(model, specs) | llama.bias_fields(model, specs)
    rotated = [int(parts.option_values(s)["rope_base"] is not None) for s in specs]
    return fields | {"no_rope_layers": rotated}


ARCHITECTURE = Architecture(
    "smollm3", "SmolLM3ForCausalLM", _model_config, _hf_config, decoder.tensors
)
