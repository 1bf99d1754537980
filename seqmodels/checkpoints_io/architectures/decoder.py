"""What the softmax decoders of the Llama line share: names, rotary positions, and config.json's
fields.

x <- x + attention(norm(x)); x <- x + SwiGLU(norm(x)), RMS norms, no biases but those a family
names.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from seqmodels import mixers
from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import HFConfig
from seqmodels.modules.pattern import MixerSpec, to_text

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
IGNORED = (r".*rotary_emb\.inv_freq",)
_LENGTH, _CONTEXT = "original_max_position_embeddings", "max_position_embeddings"
# config.json's fields in the order of `positions.SCALINGS`.
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", _CONTEXT),
    "yarn": ("factor", _LENGTH, "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
}


def model_config(config: HFConfig, specs: Sequence[MixerSpec], **fields) -> dict[str, Any]:
    """config.model of a decoder whose layers are `specs`."""
    return {
        "vocab_size": config.integer("vocab_size"),
        "d_model": config.integer("hidden_size"),
        "num_layers": len(specs),
        "pattern": to_text(specs),
        "channel_mixer": config.choice("hidden_act", ACTIVATIONS, "silu"),
        "d_ff": config.integer("intermediate_size"),
        "norm": "rms_norm",
        "norm_eps": config.positive("rms_norm_eps", 1e-6),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
    } | fields


def attention_options(config: HFConfig, **options) -> dict[str, Any]:
    """Options of `attention` that every family has. None leaves an option out."""
    H = config.integer("num_attention_heads")
    options = {
        "num_heads": H,
        "num_kv_heads": config.integer("num_key_value_heads", H),
        "head_dim": config.integer("head_dim", max(config.integer("hidden_size") // H, 1)),
        **rope_options(config),
        **options,
    }
    return {k: v for k, v in options.items() if v is not None}


def spec(**options) -> MixerSpec:
    return MixerSpec("attention", tuple(options.items()))


def layers(config: HFConfig, options: dict[str, Any]) -> list[MixerSpec]:
    """Every layer's attention: `layer_types` says which have the window of `sliding_window`."""
    L = config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window")
    default = ["sliding_attention" if window else "full_attention"] * L
    types = config.strings("layer_types", L, default)
    if unknown := sorted(set(types) - {"sliding_attention", "full_attention"}):
        raise ValueError(
            f"{config.name}: layer_types has {unknown[0]!r}, which is no softmax layer"
        )
    if "sliding_attention" in types and not window:
        raise ValueError(f"{config.name}: layer_types has sliding_attention without sliding_window")
    windowed = {"sliding_attention": {"window": window}, "full_attention": {}}
    return [spec(**options, **windowed[kind]) for kind in types]


def rope_options(config: HFConfig, fraction: float | None = None) -> dict[str, Any]:
    """rope_base, rope_scaling and rope_fraction, of `rope_parameters` or the older `rope_theta`,
    `rope_scaling` and `partial_rotary_factor`; and max_length, which is `max_position_embeddings`
    or what a scaling reaches beyond it. What is None is the mixer's default.

    fraction: of each head's channels that is rotated where the config does not say; None: all are,
      whatever it says otherwise is refused.
    """
    rope = _rope_section(config)
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(
            f"{config.name}: rope scaling {kind!r} is not supported; {', '.join(_SCALINGS)} are"
        )
    # As in transformers, fields that a kind does not read may be there; not those that say that
    # something else was meant.
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
    """What stands behind the name of the kind in `positions.SCALINGS`."""
    if kind in ("default", "linear"):
        return tuple(rope.positive(field) for field in _SCALINGS[kind])
    context = config.integer(_CONTEXT, 2048)
    if kind == "dynamic":
        return rope.positive("factor"), context
    # Some files have the length beside the section, where it comes first.
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
    """`rope_parameters` and the older `rope_scaling` as one. Files that have both say the same
    twice, or the older one was added by hand, for longer texts, beside one without a scaling."""
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
    """The inverse of `rope_options`, with what programs older than rope_parameters read. partial:
    with the fraction."""
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


def hf_config(model: dict[str, Any], specs: Sequence[MixerSpec], **fields) -> dict[str, Any]:
    """config.json's fields for every family; `fields` add to them."""
    if any(s.name != "attention" for s in specs):
        raise ValueError(
            f"only softmax attention has a place in this layout; there is {_other(specs)}"
        )
    options = option_values(specs[0])
    activation = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}.get(model["channel_mixer"])
    if activation is None or not model["d_ff"]:
        raise ValueError(
            "this layout takes a gated channel mixer (swiglu, geglu) with a given d_ff"
        )
    H = options["num_heads"]
    head_dim = options["head_dim"] or model["d_model"] // H
    windows = {option_values(s)["window"] for s in specs} - {None}
    rotated = next((o for s in specs if (o := option_values(s))["rope_base"]), options)
    return (
        {
            "vocab_size": model["vocab_size"],
            "hidden_size": model["d_model"],
            "intermediate_size": model["d_ff"],
            "num_hidden_layers": model["num_layers"],
            "num_attention_heads": H,
            "num_key_value_heads": options["num_kv_heads"] or H,
            "head_dim": head_dim,
            "hidden_act": activation,
            "max_position_embeddings": max(option_values(s)["max_length"] for s in specs),
            "rms_norm_eps": model["norm_eps"],
            "tie_word_embeddings": model["tied_embeddings"],
            "sliding_window": min(windows) if windows else None,
        }
        | rope_fields(rotated)
        | fields
    )


def layer_types(specs: Sequence[MixerSpec]) -> list[str]:
    return ["sliding_attention" if option_values(s)["window"] else "full_attention" for s in specs]


def option_values(spec: MixerSpec) -> dict[str, Any]:
    """All options of a layer, defaults too."""
    return mixers.options(spec.name) | dict(spec.options)


def tensors(model: dict[str, Any], specs: Sequence[MixerSpec]) -> Iterator[rules.Rule]:
    """The table of names."""
    yield rules.same("model.embed_tokens.weight", "embed/embedding")
    yield rules.same("model.norm.weight", "final_norm/scale")
    if not model["tied_embeddings"]:
        yield rules.transposed("lm_head.weight", "output/kernel")
    for i, layer in enumerate(specs):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield rules.same(f"{theirs}.input_layernorm.weight", f"{ours}/mixer_norm/scale")
        yield rules.same(f"{theirs}.post_attention_layernorm.weight", f"{ours}/channel_norm/scale")
        yield from attention(layer, f"{theirs}.self_attn", f"{ours}/mixer")
        bias = model["channel_bias"]
        for name in ("gate", "up", "down"):
            path = f"{ours}/channel_mixer/{name}"
            yield from rules.linear(f"{theirs}.mlp.{name}_proj", path, bias)


def attention(layer: MixerSpec, theirs: str, ours: str) -> Iterator[rules.Rule]:
    """An attention layer's tensors."""
    options = option_values(layer)
    bias, o_bias = options["use_bias"], options["o_bias"]
    for name in "qkv":
        yield from rules.linear(f"{theirs}.{name}_proj", f"{ours}/{name}", bias)
    yield from rules.linear(f"{theirs}.o_proj", f"{ours}/o", bias if o_bias is None else o_bias)
    if options["qk_norm"]:
        for name in ("q_norm", "k_norm"):
            yield rules.same(f"{theirs}.{name}.weight", f"{ours}/{name}/scale")


def _other(specs: Sequence[MixerSpec]) -> str:
    return ", ".join(sorted({s.name for s in specs} - {"attention"}))
