"""Functions that the families of softmax decoders in the style of Llama share.

Layers are x <- x + attention(norm(x)), then x <- x + SwiGLU(norm(x)), with RMS norms, rotary
positions, and no biases but those that a family names.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import HFConfig, parts
from seqmodels.modules.pattern import MixerSpec, to_text

_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
_TYPES = ("sliding_attention", "full_attention")
_FIELDS = (*parts.model_fields("rms_norm_eps", norm_eps=1e-6), parts.D_FF)
_LENGTH, _CONTEXT = "original_max_position_embeddings", "max_position_embeddings"
# Fields of config.json, in the order of `positions.SCALINGS`.
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", _CONTEXT),
    "yarn": ("factor", _LENGTH, "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
}


def model_config(config: HFConfig, specs: Sequence[MixerSpec], **fields) -> dict[str, Any]:
    """Returns config.model for a config.json and its layers `specs`; `fields` are added."""
    return config.options(_FIELDS) | {
        "pattern": to_text(specs),
        "channel_mixer": config.choice("hidden_act", _ACTIVATIONS, "silu"),
        "norm": "rms_norm",
        **fields,
    }


def attention_options(
    config: HFConfig,
    D: int | None = None,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    rotated: float | None = None,
    **options,
) -> dict[str, Any]:
    """Reads the options of the mixer `attention` from config.json: heads, widths, rotary positions.

    D, heads, kv_heads, head_dim: what the family's library takes for absent fields, if anything.
    rotated: the fraction of channels that is rotated, `fraction` of `rope_options`.
    options: further options of the mixer. Those that are None are left out of the result.
    """
    H = config.integer("num_attention_heads", heads)
    head_dim = head_dim or max(config.integer("hidden_size", D) // H, 1)
    options = {
        "num_heads": H,
        "num_kv_heads": config.integer("num_key_value_heads", kv_heads or H),
        "head_dim": config.integer("head_dim", head_dim),
        **rope_options(config, rotated),
        **options,
    }
    return {k: v for k, v in options.items() if v is not None}


def attention_fields(
    options: dict[str, Any], d_model: int, partial: bool = False
) -> dict[str, Any]:
    """Returns config.json's fields for attention's options; partial: whether with rope_fraction."""
    H = options["num_heads"]
    return {
        "num_attention_heads": H,
        "num_key_value_heads": options["num_kv_heads"] or H,
        "head_dim": options["head_dim"] or d_model // H,
        "max_position_embeddings": options["max_length"],
        **rope_fields(options, partial),
    }


def layers(config: HFConfig, options: dict[str, Any]) -> list[MixerSpec]:
    """Returns the MixerSpec of every layer of a config.json, all softmax attention with `options`.

    Layers that `layer_types` calls "sliding_attention" have the window `sliding_window`; without
    `layer_types` all layers have it, if it is set.
    """
    window = config.optional_integer("sliding_window")
    default = [_TYPES[0] if window else _TYPES[1]] * config.integer("num_hidden_layers")
    types = config.layer_types(default, _TYPES)
    if "sliding_attention" in types and not window:
        raise ValueError(f"{config.name}: layer_types has sliding_attention without sliding_window")
    windows = {"sliding_attention": window, "full_attention": None}
    return [parts.spec("attention", **options, window=windows[kind]) for kind in types]


def rope_options(config: HFConfig, fraction: float | None = None) -> dict[str, Any]:
    """Reads config.json's rotary positions (RoPE) as options of the mixer `attention`.

    Returns rope_base, rope_scaling, rope_fraction and max_length; None stands for the mixer's
    default. They stand in `rope_parameters`, or the older `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`. max_length is `max_position_embeddings`, or how far a scaling reaches.

    fraction: the fraction of each head's channels that is rotated where config.json does not say.
      None: all channels are, and a config.json that says otherwise is refused.
    """
    rope = _rope_section(config)
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(
            f"{config.name}: rope scaling {kind!r} is not supported; {', '.join(_SCALINGS)} are"
        )
    # As in transformers, a section may have fields that its kind does not read. Refused are those
    # that say that another rotation is meant.
    if nested := [k for k, v in rope.fields.items() if isinstance(v, dict)]:
        raise ValueError(
            f"{rope.name}: {nested[0]} is an object; one rotation for each type of layers is not supported"
        )
    if kind == "default" and rope.get("factor", 1.0) != 1.0:
        raise ValueError(f"{rope.name}: factor is {rope.get('factor')!r} without a rope_type")
    base = rope.positive("rope_theta", config.positive("rope_theta", 10_000.0))
    values = _scaling_values(config, rope, kind)
    part = rope.positive(
        "partial_rotary_factor", config.positive("partial_rotary_factor", fraction or 1.0)
    )
    if part > 1 or fraction is None and part < 1:
        raise ValueError(
            f"{config.name}: partial_rotary_factor is {part}; it must be "
            + ("1 for this architecture" if fraction is None else "1 at most")
        )
    reach = round(values[0] * values[1]) if kind in ("dynamic", "yarn") else 0
    return {
        "rope_base": base,
        "rope_scaling": (kind, *values) if values else None,
        "rope_fraction": None if fraction is None else part,
        "max_length": max(config.integer(_CONTEXT, 2048), reach),
    }


def _scaling_values(config: HFConfig, rope: HFConfig, kind: str) -> tuple[float | bool, ...]:
    """Returns the numbers of a RoPE scaling (`rope_type` is `kind`), in positions.SCALINGS'
    order."""
    if kind in ("default", "linear"):
        return tuple(rope.positive(field) for field in _SCALINGS[kind])
    context = config.integer(_CONTEXT, 2048)
    if kind == "dynamic":
        return rope.positive("factor"), context
    # A length beside the section takes precedence over one in it.
    length = config.positive(_LENGTH, rope.positive(_LENGTH, context))
    if kind == "llama3":
        return *(rope.positive(field) for field in _SCALINGS[kind][:-1]), length
    factor = rope.positive("factor", context / length)

    def growth(scale):
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scales = [rope.number(field, 0.0) for field in ("mscale", "mscale_all_dim")]
    amplitude = growth(scales[0]) / growth(scales[1]) if all(scales) else growth(1.0)
    amplitude = rope.positive("attention_factor", amplitude)
    betas = (rope.positive(f, default) for f, default in (("beta_fast", 32), ("beta_slow", 1)))
    return factor, length, amplitude, *betas, rope.flag("truncate", True)


def _rope_section(config: HFConfig) -> HFConfig:
    """Returns config.json's `rope_parameters` and older `rope_scaling`, merged into one section.

    Files that have both state the same twice, or rope_scaling was added by hand, for longer texts,
    to rope_parameters without a scaling. Raises ValueError where the two contradict each other.
    """
    merged: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):
        section = {k: v for k, v in config.section(field).fields.items() if v is not None}
        older = section.pop("type", None)
        section = ({"rope_type": older} if older is not None else {}) | section
        if section and merged.get("rope_type") == "default":
            del merged["rope_type"]
        if differing := [k for k in merged.keys() & section.keys() if merged[k] != section[k]]:
            k = min(differing)
            raise ValueError(
                f"{config.name}: {k} is {merged[k]!r} in rope_parameters and {section[k]!r} in rope_scaling"
            )
        merged |= section
    return HFConfig(merged, f"{config.name}, rope_parameters")


def rope_fields(options: dict[str, Any], partial: bool = False) -> dict[str, Any]:
    """Returns config.json's fields of rotary positions (RoPE) for options of the mixer `attention`.

    Inverts `rope_options`. Beside `rope_parameters` the result has the older fields `rope_theta`
    and `rope_scaling`, which other programs may read. partial: whether to write rope_fraction.
    """
    kind, *values = options["rope_scaling"] or ("default",)
    theta = float(options["rope_base"] or 10_000.0)
    scaling = {"rope_type": kind} | dict(zip(_SCALINGS.get(kind, ()), values))
    scaling |= {field: int(scaling[field]) for field in (_LENGTH, _CONTEXT) if field in scaling}
    context = {_CONTEXT: scaling.pop(_CONTEXT)} if _CONTEXT in scaling else {}
    scaling |= {"partial_rotary_factor": options["rope_fraction"]} if partial else {}
    return context | {
        "rope_parameters": scaling | {"rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else scaling,
    }


def hf_config(model: dict[str, Any], specs: Sequence[MixerSpec]) -> dict[str, Any]:
    """Returns config.json's fields for a decoder; raises ValueError if a mixer is not attention."""
    if others := sorted({s.name for s in specs} - {"attention"}):
        raise ValueError(
            f"only softmax attention has a place in this layout; there is {', '.join(others)}"
        )
    activation = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}.get(model["channel_mixer"])
    if activation is None or not model["d_ff"]:
        raise ValueError(
            "this layout takes a gated channel mixer (swiglu, geglu) with a given d_ff"
        )
    options = [parts.option_values(s) for s in specs]
    windows = {o["window"] for o in options} - {None}
    # A layer without positions does not say how the others are rotated.
    rotated = next((o for o in options if o["rope_base"]), options[0])
    return {
        **parts.fields_of(model, _FIELDS),
        **attention_fields(options[0], model["d_model"]),
        "hidden_act": activation,
        "max_position_embeddings": max(o["max_length"] for o in options),
        "sliding_window": min(windows) if windows else None,
        **rope_fields(rotated),
    }


def layer_types(specs: Sequence[MixerSpec]) -> list[str]:
    """Returns config.json's `layer_types`: a layer is "sliding_attention" with a window, else
    "full_attention"."""
    return [_TYPES[parts.option_values(s)["window"] is None] for s in specs]


def tensors(model: dict[str, Any], specs: Sequence[MixerSpec]) -> Iterator[rules.Rule]:
    """Yields the conversion rules for all tensors of a decoder that are named as Llama's."""
    yield from parts.ends(model, "model.embed_tokens", "model.norm")
    for i, layer in enumerate(specs):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield from parts.block_norms(theirs, ours, "input_layernorm", "post_attention_layernorm")
        yield from attention(layer, f"{theirs}.self_attn", f"{ours}/mixer")
        bias = model["channel_bias"]
        yield from parts.linears(f"{theirs}.mlp", f"{ours}/channel_mixer", parts.MLP, bias)


def attention(layer: MixerSpec, theirs: str, ours: str) -> Iterator[rules.Rule]:
    """Yields the conversion rules for one softmax attention layer, norms of q and k included."""
    options = parts.option_values(layer)
    bias, o_bias = options["use_bias"], options["o_bias"]
    yield from parts.linears(theirs, ours, {f"{name}_proj": name for name in "qkv"}, bias)
    yield from rules.linear(f"{theirs}.o_proj", f"{ours}/o", bias if o_bias is None else o_bias)
    if options["qk_norm"]:
        for name in ("q_norm", "k_norm"):
            yield parts.norm(f"{theirs}.{name}", f"{ours}/{name}")
