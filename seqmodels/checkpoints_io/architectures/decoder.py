"""What the softmax decoders of the Llama line share: names, rotary positions, and config.json's fields.

x <- x + attention(norm(x)); x <- x + SwiGLU(norm(x)), RMS norms, no biases but those a family names.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from seqmodels import mixers
from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import HFConfig
from seqmodels.pattern import MixerSpec, to_text

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
IGNORED = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
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
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
    } | fields


def attention_options(config: HFConfig, **options) -> dict[str, Any]:
    """Options of `attention` that every family has. None leaves an option out."""
    H = config.integer("num_attention_heads")
    options = {
        "num_heads": H,
        "num_kv_heads": config.integer("num_key_value_heads", H),
        "head_dim": config.integer("head_dim", max(config.integer("hidden_size") // H, 1)),
        "max_length": config.integer("max_position_embeddings", 2048),
        **rope_options(config),
        **options,
    }
    return {k: v for k, v in options.items() if v is not None}


def spec(**options) -> MixerSpec:
    return MixerSpec("attention", tuple(options.items()))


def layers(config: HFConfig, options: dict[str, Any]) -> list[MixerSpec]:
    """Every layer's attention: `layer_types` says which have the window of `sliding_window`."""
    L = config.integer("num_hidden_layers")
    window = config.get("sliding_window") and config.integer("sliding_window")
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


def rope_options(config: HFConfig) -> dict[str, Any]:
    """rope_base and rope_scaling, of `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    scaling = config.section("rope_parameters" if config.get("rope_parameters") else "rope_scaling")
    base = scaling.number("rope_theta", config.number("rope_theta", 10_000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(
            f"{config.name}: rope scaling {kind!r} is not supported; {', '.join(_SCALINGS)} are"
        )
    values = tuple(scaling.number(field) for field in _SCALINGS[kind])
    return {"rope_base": base, "rope_scaling": (kind, *values) if values else None}


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
    base = next((b for s in specs if (b := option_values(s)["rope_base"])), 10_000.0)
    kind, *values = options["rope_scaling"] or ("default",)
    rope = {"rope_type": kind, "rope_theta": float(base)}
    rope |= {
        field: int(value) if field.startswith("original") else value
        for field, value in zip(_SCALINGS.get(kind, ()), values)
    }
    legacy = None if kind == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
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
        "rope_parameters": rope,
        # What programs older than rope_parameters read.
        "rope_theta": float(base),
        "rope_scaling": legacy,
        "sliding_window": min(windows) if windows else None,
    } | fields


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
