"""What the layouts of flash-linear-attention (github.com/fla-org/flash-linear-attention) share.

x <- x + mixer(norm(x)); x <- x + SwiGLU(norm(x)), RMS norms, "attn" for every mixer, and softmax
attention where `attn` of config.json says so.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, decoder, parts
from seqmodels.modules.pattern import MixerSpec, to_text

# Options of the kernels, which change no result, may be anything; these change what is computed.
_REFUSED = {"attnres_block_size": None}
_ACTIVATIONS = {"swish": "swiglu", "silu": "swiglu"}


def architecture(
    model_type: str,
    class_name: str,
    mixer: str,
    options: Callable[[HFConfig], dict[str, Any]],
    fields: Callable[[dict[str, Any], int], dict[str, Any]],
    tensors: Callable[[dict[str, Any], str, str], Iterable[rules.Rule]],
    refused: Mapping[str, Any] | None = None,
    hidden_ratio: int = 4,
    extra: Callable[[], Iterable[rules.Rule]] = tuple,
) -> Architecture:
    """A family of which a file says: its mixer, options of it from config.json and back, and its
    tensors' names.

    options: config to the mixer's options. fields: (options, d_model) to config.json's. tensors:
    (options, their prefix, our path) to rules. refused: fields of which only this value is
    supported. extra: rules that belong to no layer.
    """

    def model_config(config: HFConfig) -> dict[str, Any]:
        for field, value in (_REFUSED | dict(refused or {})).items():
            config.require(field, value)
        D, L = config.integer("hidden_size", 2048), config.integer("num_hidden_layers", 24)
        softmax = _softmax_layers(config, D, L)
        own = parts.spec(mixer, **options(config))
        ratio = config.positive("hidden_ratio", hidden_ratio)
        F = config.integer("intermediate_size", max(-(-int(D * ratio * 2 / 3) // 256) * 256, 256))
        return {
            "vocab_size": config.integer("vocab_size", 32_000),
            "d_model": D,
            "num_layers": L,
            "pattern": to_text([softmax.get(i, own) for i in range(L)]),
            "channel_mixer": config.choice("hidden_act", _ACTIVATIONS, "swish"),
            "d_ff": F,
            "norm_eps": config.positive("norm_eps", 1e-6),
            "tied_embeddings": config.flag("tie_word_embeddings", False),
        }

    def hf_config(model, specs) -> dict[str, Any]:
        parts.only(specs, mixer, "attention")
        return {
            "vocab_size": model["vocab_size"],
            "hidden_size": model["d_model"],
            "intermediate_size": parts.given(model, "d_ff"),
            "num_hidden_layers": model["num_layers"],
            "norm_eps": model.get("norm_eps", 1e-5),
            "tie_word_embeddings": model.get("tied_embeddings", True),
            "hidden_act": "swish",
            "attn": _attn(specs),
            "max_position_embeddings": _context(specs),
            **{k: v for k, v in (_REFUSED | dict(refused or {})).items() if v is not None},
            **fields(parts.options_of(specs, mixer), model["d_model"]),
        }

    def table(model, specs):
        yield from parts.ends(model, "model.embeddings", "model.norm")
        yield from extra()
        for i, layer in enumerate(specs):
            theirs, ours = f"model.layers.{i}", f"block_{i}"
            yield parts.norm(f"{theirs}.attn_norm", f"{ours}/mixer_norm")
            yield parts.norm(f"{theirs}.mlp_norm", f"{ours}/channel_norm")
            yield from parts.gated_mlp(f"{theirs}.mlp", f"{ours}/channel_mixer")
            theirs, ours = f"{theirs}.attn", f"{ours}/mixer"
            if layer.name == "attention":
                yield from decoder.attention(layer, theirs, ours)
            else:
                own = decoder.option_values(layer) | {"d_model": model["d_model"]}
                yield from tensors(own, theirs, ours)

    return Architecture(
        model_type=model_type,
        class_name=class_name,
        model_config=model_config,
        hf_config=hf_config,
        rules=table,
        ignored=decoder.IGNORED,
    )


def heads_options(config: HFConfig, heads: int, expand_k: float, expand_v: float) -> dict[str, Any]:
    """What GLA and RetNet have in common, with their defaults: as many key heads as value heads, of
    widths of their own."""
    H = config.integer("num_heads", heads)
    config.require("num_kv_heads", H)
    return {
        "num_heads": H,
        "expand_k": config.positive("expand_k", expand_k),
        "expand_v": config.positive("expand_v", expand_v),
        "norm_eps": config.positive("norm_eps", 1e-6),
    }


def heads_fields(options: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    """The inverse of `heads_options`."""
    return {name: options[name] for name in ("num_heads", "expand_k", "expand_v")}


# A norm that is not fused has another name.
HEADS_REFUSED = {
    "fuse_norm": True,
    "use_short_conv": False,
    "use_output_gate": True,
    "elementwise_affine": True,
    "feature_map": None,
}


def projections(theirs: str, ours: str, names: str) -> Iterable[rules.Rule]:
    """ "qkv" is q_proj, k_proj and v_proj."""
    return parts.linears(theirs, ours, {f"{name}_proj": name for name in names})


def short_convs(theirs: str, ours: str, names: str = "qkv") -> Iterable[rules.Rule]:
    for name in names:
        yield from rules.conv1d(f"{theirs}.{name}_conv1d", f"{ours}/{name}_conv")


def _softmax_layers(config: HFConfig, D: int, L: int) -> dict[int, MixerSpec]:
    """The layers of `attn`: one object or a list of them, each {layers, num_heads, num_kv_heads,
    qkv_bias, window_size, rope_theta}."""
    found = config.get("attn") or []
    layers: dict[int, MixerSpec] = {}
    for item in found if isinstance(found, list) else [found]:
        if not isinstance(item, dict):
            raise ValueError(f"{config.name}: attn is {found!r}; it must hold objects")
        attn = HFConfig(item, f"{config.name}, attn")
        H = attn.integer("num_heads")
        layer = parts.spec(
            "attention",
            num_heads=H,
            num_kv_heads=attn.integer("num_kv_heads", H),
            head_dim=max(D // H, 1),
            window=attn.optional_integer("window_size"),
            max_length=config.integer("max_position_embeddings", 2048),
            rope_base=attn.positive("rope_theta", 10_000.0),
            use_bias=attn.flag("qkv_bias", False),
            o_bias=False,
        )
        for i in parts.listed(attn, "layers", int):
            if not 0 <= i < L or i in layers:
                raise ValueError(f"{config.name}: attn names layer {i} twice, or beyond {L} layers")
            layers[i] = layer
    return layers


def _attn(specs) -> list[dict[str, Any]] | None:
    """The inverse of `_softmax_layers`."""
    layers: dict[MixerSpec, list[int]] = {}
    for i, layer in enumerate(specs):
        if layer.name == "attention":
            layers.setdefault(layer, []).append(i)
    found = []
    for layer, indices in layers.items():
        options = decoder.option_values(layer)
        found.append(
            {
                "layers": indices,
                "num_heads": options["num_heads"],
                "num_kv_heads": options["num_kv_heads"] or options["num_heads"],
                "qkv_bias": options["use_bias"],
                "window_size": options["window"],
                "rope_theta": options["rope_base"],
            }
        )
    return found or None


def _context(specs) -> int:
    contexts = [decoder.option_values(s)["max_length"] for s in specs if s.name == "attention"]
    return max(contexts, default=2048)
