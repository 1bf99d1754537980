"""RecurrentGemma (arXiv 2404.07839) checkpoints: Griffin (arXiv 2402.19427), with RG-LRU layers and
windowed multi-query attention."""

import jax.numpy as jnp
import numpy as np

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, decoder, parts
from seqmodels.modules.pattern import to_text

_MIXERS = {"recurrent": "rg_lru", "attention": "attention"}
_MODEL = (
    *parts.model_fields(
        "rms_norm_eps",
        vocab_size=256_000,
        d_model=2560,
        num_layers=26,
        norm_eps=1e-6,
        tied_embeddings=True,
    ),
    parts.Field("logits_soft_cap", "logit_softcap", HFConfig.positive, 30.0),
)


def _model_config(config):
    config.require(hidden_activation="gelu_pytorch_tanh", embeddings_scale_by_sqrt_dim=True)
    model = config.options(_MODEL)
    D, L = model["d_model"], model["num_layers"]
    H, F = config.integer("num_attention_heads", 10), config.integer("intermediate_size", 7680)
    if D % H or F % 2:
        raise ValueError(
            f"{config.name}: num_attention_heads {H} must divide hidden_size {D}, and 2 intermediate_size {F}"
        )
    softmax = decoder.attention_options(
        config,
        D,
        heads=10,
        rotated=0.5,
        window=config.integer("attention_window_size", 2048),
        use_bias=config.flag("attention_bias", False),
        o_bias=True,
    )
    layers = {
        "recurrent": parts.spec(
            "rg_lru",
            num_heads=H,
            lru_width=config.integer("lru_width", D),
            conv_width=config.integer("conv1d_width", 4),
        ),
        "attention": parts.spec("attention", **softmax | {"head_dim": D // H}),
    }
    types = config.listed("block_types", str, ("recurrent", "recurrent", "attention"))
    if not types or set(types) - set(_MIXERS):
        raise ValueError(
            f"{config.name}: block_types is {types!r}; it must list {' and '.join(_MIXERS)}"
        )
    return model | {
        "pattern": to_text([layers[types[i % len(types)]] for i in range(L)]),
        "channel_mixer": "geglu",
        "channel_bias": True,
        "d_ff": F // 2,
        "norm": "zero_centred_rms_norm",
        "embedding_scale": _embedding_scale(D),
    }


def _embedding_scale(D: int) -> float:
    """Returns the factor of embeddings, sqrt(D) rounded to bfloat16 as in training."""
    return float(np.sqrt(D).astype(jnp.bfloat16))


def _hf_config(model, specs):
    parts.only(specs, *_MIXERS.values())
    recurrent = parts.options_of(specs, "rg_lru")
    softmax = parts.options_of(specs, "attention", optional=True)
    kind_of = {mixer: kind for kind, mixer in _MIXERS.items()}
    D, H = model["d_model"], recurrent["num_heads"]
    return {
        **parts.fields_of(model, _MODEL),
        **decoder.attention_fields(softmax | {"num_heads": H, "head_dim": D // H}, D, partial=True),
        "intermediate_size": 2 * parts.given(model, "d_ff"),
        "block_types": [kind_of[layer.name] for layer in specs],
        "lru_width": recurrent["lru_width"] or D,
        "conv1d_width": recurrent["conv_width"],
        "attention_window_size": softmax["window"] or 2048,
        "attention_bias": softmax["use_bias"],
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _rules(model, specs):
    yield from parts.ends(model, "model.embed_tokens", "model.final_norm")
    for i, layer in enumerate(specs):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield from parts.block_norms(theirs, ours, "temporal_pre_norm", "channel_pre_norm")
        yield from parts.linears(
            f"{theirs}.mlp_block", f"{ours}/channel_mixer", parts.MLP, bias=True
        )
        theirs, ours = f"{theirs}.temporal_block", f"{ours}/mixer"
        if layer.name == "attention":
            yield from decoder.attention(layer, theirs, ours)
        else:
            yield from _recurrent(theirs, ours)


def _recurrent(theirs, ours):
    names = {"linear_x": "x", "linear_y": "g", "linear_out": "o"}
    yield from parts.linears(theirs, ours, names, bias=True)
    yield from rules.linear(f"{theirs}.conv_1d", f"{ours}/x_conv", True, rules.CONV1D)
    names = {
        "recurrent_param": "Lambda",
        "recurrent_gate_weight": "r_kernel",
        "recurrent_gate_bias": "r_bias",
        "input_gate_weight": "i_kernel",
        "input_gate_bias": "i_bias",
    }
    yield from parts.same(f"{theirs}.rg_lru", ours, names)


ARCHITECTURE = Architecture(
    "recurrent_gemma", "RecurrentGemmaForCausalLM", _model_config, _hf_config, _rules
)
