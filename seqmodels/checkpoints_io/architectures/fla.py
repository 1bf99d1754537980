"""Functions that the families of flash-linear-attention share.

Source: github.com/fla-org/flash-linear-attention. Layers are x <- x + mixer(norm(x)), then
x <- x + SwiGLU(norm(x)), with RMS norms. Every mixer's tensors are called "attn"; the field `attn`
of config.json says which layers have softmax attention.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, decoder, parts
from seqmodels.modules.pattern import MixerSpec, to_text

_ACTIVATIONS = {"swish": "swiglu", "silu": "swiglu"}
_MODEL = parts.model_fields(
    "norm_eps", vocab_size=32_000, d_model=2048, num_layers=24, norm_eps=1e-6
)
_SOFTMAX = (
    parts.Field("num_heads", "num_heads", HFConfig.integer),
    parts.Field("qkv_bias", "use_bias", HFConfig.flag, False),
    parts.Field("rope_theta", "rope_base", HFConfig.positive, 10_000.0),
)
_NORM_EPS = parts.Field("norm_eps", "norm_eps", HFConfig.positive, 1e-6)


def architecture(
    model_type: str,
    class_name: str,
    mixer: str,
    table: Sequence[parts.Field],
    tensors: Callable[[dict[str, Any], str, str], Iterable[rules.Rule]],
    required: Mapping[str, Any],
    *,
    options: Callable[[HFConfig], dict[str, Any]] = lambda config: {},
    fields: Callable[[dict[str, Any], int], dict[str, Any]] = lambda options, d_model: {},
    hidden_ratio: int = 4,
    extra: Callable[[], Iterable[rules.Rule]] = tuple,
) -> Architecture:
    """Returns the Architecture of a family of flash-linear-attention, from what only its mixer has.

    Args:
      mixer: the mixer's name in our registry.
      table: config.json's fields that are options of the mixer.
      tensors: (options, prefix of tensor names, our path) to the mixer's conversion rules.
      required: fields of which only this value is supported. Fields that choose between kernels,
        and change no result, may have any.
      options: config.json to the mixer's options beside those of `table`.
      fields: (options, d_model) to config.json's fields; inverts `options`.
      hidden_ratio: default of config.json's field of this name.
      extra: returns the rules for tensors outside the layers.
    """

    def model_config(config: HFConfig) -> dict[str, Any]:
        config.require(attnres_block_size=None, **required)
        model = config.options(_MODEL)
        D, L = model["d_model"], model["num_layers"]
        softmax = _softmax_layers(config, D, L)
        own = parts.spec(mixer, **config.options(table) | options(config))
        # Two thirds of ratio * D, as a SwiGLU has three matrices, in multiples of 256.
        ratio = config.positive("hidden_ratio", hidden_ratio)
        width = max(-(-int(D * ratio * 2 / 3) // 256) * 256, 256)
        return model | {
            "pattern": to_text([softmax.get(i, own) for i in range(L)]),
            "channel_mixer": config.choice("hidden_act", _ACTIVATIONS, "swish"),
            "d_ff": config.integer("intermediate_size", width),
        }

    def hf_config(model, specs) -> dict[str, Any]:
        parts.only(specs, mixer, "attention")
        own = parts.options_of(specs, mixer)
        softmax = [parts.option_values(s) for s in specs if s.name == "attention"]
        return {
            **parts.fields_of(model, (*_MODEL, parts.D_FF)),
            "hidden_act": "swish",
            "attn": _attn(specs),
            "max_position_embeddings": max((o["max_length"] for o in softmax), default=2048),
            **{k: v for k, v in required.items() if v is not None},
            **parts.fields_of(own, table),
            **fields(own, model["d_model"]),
        }

    def all_rules(model, specs):
        yield from parts.ends(model, "model.embeddings", "model.norm")
        yield from extra()
        for i, layer in enumerate(specs):
            theirs, ours = f"model.layers.{i}", f"block_{i}"
            yield from parts.block_norms(theirs, ours, "attn_norm", "mlp_norm")
            yield from parts.linears(f"{theirs}.mlp", f"{ours}/channel_mixer", parts.MLP)
            theirs, ours = f"{theirs}.attn", f"{ours}/mixer"
            if layer.name == "attention":
                yield from decoder.attention(layer, theirs, ours)
            else:
                yield from tensors(parts.option_values(layer), theirs, ours)

    return Architecture(model_type, class_name, model_config, hf_config, all_rules)


def delta_fields(use_gate: bool) -> tuple[parts.Field, ...]:
    """Returns the config.json fields that both delta rule families have; `use_gate` is a
    default."""
    return (
        parts.Field("conv_size", "conv_width", HFConfig.integer, 4),
        parts.Field("allow_neg_eigval", "allow_neg_eigval", HFConfig.flag, False),
        parts.Field("use_gate", "use_gate", HFConfig.flag, use_gate),
        _NORM_EPS,
    )


def head_fields(heads: int, expand_k: float, expand_v: float) -> tuple[parts.Field, ...]:
    """Returns the config.json fields that GLA and RetNet share; the arguments are defaults."""
    return (
        parts.Field("num_heads", "num_heads", HFConfig.integer, heads),
        parts.Field("expand_k", "expand_k", HFConfig.positive, expand_k),
        parts.Field("expand_v", "expand_v", HFConfig.positive, expand_v),
        _NORM_EPS,
    )


# What GLA and RetNet require beside `require_all_heads`. Norms that are not fused have other names.
HEADS_REQUIRED = {
    "fuse_norm": True,
    "use_short_conv": False,
    "use_output_gate": True,
    "elementwise_affine": True,
    "feature_map": None,
}


def require_all_heads(config: HFConfig, heads: int) -> None:
    """Raises ValueError if num_kv_heads differs from num_heads, which is `heads` if absent."""
    config.require(num_kv_heads=config.integer("num_heads", heads))


def projections(theirs: str, ours: str, names: str) -> Iterable[rules.Rule]:
    """Yields the conversion rules for nn.Linears by letter: "qkv" is q_proj, k_proj, v_proj."""
    return parts.linears(theirs, ours, {f"{name}_proj": name for name in names})


def short_convs(theirs: str, ours: str) -> Iterable[rules.Rule]:
    for name in "qkv":
        conv = f"{theirs}.{name}_conv1d", f"{ours}/{name}_conv"
        yield from rules.linear(*conv, move=rules.CONV1D)


def _softmax_layers(config: HFConfig, D: int, L: int) -> dict[int, MixerSpec]:
    """Returns {layer's index: MixerSpec} for the layers of softmax attention in a config.json.

    Its field `attn` is an object or a list of them, each with its layers' indices. D: the width. L:
    the number of all layers.
    """
    found = config.get("attn") or []
    layers: dict[int, MixerSpec] = {}
    for item in found if isinstance(found, list) else [found]:
        if not isinstance(item, dict):
            raise ValueError(f"{config.name}: attn is {found!r}; it must hold objects")
        attn = HFConfig(item, f"{config.name}, attn")
        options = attn.options(_SOFTMAX)
        H = options["num_heads"]
        layer = parts.spec(
            "attention",
            **options,
            max_length=config.integer("max_position_embeddings", 2048),
            num_kv_heads=attn.integer("num_kv_heads", H),
            head_dim=max(D // H, 1),
            window=attn.optional_integer("window_size"),
            o_bias=False,
        )
        for i in attn.listed("layers", int):
            if not 0 <= i < L or i in layers:
                raise ValueError(f"{config.name}: attn names layer {i} twice, or beyond {L} layers")
            layers[i] = layer
    return layers


def _attn(specs: Sequence[MixerSpec]) -> list[dict[str, Any]] | None:
    """Returns config.json's `attn`, which describes the layers of softmax attention, if any."""
    indices: dict[MixerSpec, list[int]] = {}
    for i, layer in enumerate(specs):
        if layer.name == "attention":
            indices.setdefault(layer, []).append(i)
    found = []
    for layer, own in indices.items():
        options = parts.option_values(layer)
        kv_heads = options["num_kv_heads"] or options["num_heads"]
        beside = {"layers": own, "num_kv_heads": kv_heads, "window_size": options["window"]}
        found.append(parts.fields_of(options, _SOFTMAX) | beside)
    return found or None
