"""RecurrentGemma (arXiv 2404.07839), which is Griffin (arXiv 2402.19427): RG-LRU layers and
windowed multi-query attention."""

import jax.numpy as jnp
import numpy as np

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, decoder, parts
from seqmodels.modules.pattern import to_text

_MIXERS = {"recurrent": "rg_lru", "attention": "attention"}


def _model_config(config):
    parts.refuse_unless(
        config, hidden_activation="gelu_pytorch_tanh", embeddings_scale_by_sqrt_dim=True
    )
    D, L = config.integer("hidden_size", 2560), config.integer("num_hidden_layers", 26)
    H, F = config.integer("num_attention_heads", 10), config.integer("intermediate_size", 7680)
    if D % H or F % 2:
        raise ValueError(
            f"{config.name}: num_attention_heads {H} must divide hidden_size {D}, and 2 intermediate_size {F}"
        )
    layers = {
        "rg_lru": parts.spec(
            "rg_lru",
            num_heads=H,
            lru_width=config.integer("lru_width", D),
            conv_width=config.integer("conv1d_width", 4),
        ),
        "attention": parts.spec(
            "attention",
            num_heads=H,
            num_kv_heads=config.integer("num_key_value_heads", H),
            head_dim=D // H,
            window=config.integer("attention_window_size", 2048),
            use_bias=config.flag("attention_bias", False),
            o_bias=True,
            **decoder.rope_options(config, 0.5),
        ),
    }
    types = parts.listed(config, "block_types", str, ("recurrent", "recurrent", "attention"))
    if not types or set(types) - set(_MIXERS):
        raise ValueError(
            f"{config.name}: block_types is {types!r}; it must list {' and '.join(_MIXERS)}"
        )
    return {
        "vocab_size": config.integer("vocab_size", 256_000),
        "d_model": D,
        "num_layers": L,
        "pattern": to_text([layers[_MIXERS[types[i % len(types)]]] for i in range(L)]),
        "channel_mixer": "geglu",
        "channel_bias": True,
        "d_ff": F // 2,
        "norm": "zero_centred_rms_norm",
        "norm_eps": config.positive("rms_norm_eps", 1e-6),
        "tied_embeddings": config.flag("tie_word_embeddings", True),
        "embedding_scale": _embedding_scale(D),
        "logit_softcap": config.positive("logits_soft_cap", 30.0),
    }


def _embedding_scale(D: int) -> float:
    """sqrt(D) as the model was trained with it: in bfloat16."""
    return float(np.sqrt(D).astype(jnp.bfloat16))


def _hf_config(model, specs):
    parts.only(specs, *_MIXERS.values())
    recurrent = parts.options_of(specs, "rg_lru")
    softmax = [layer for layer in specs if layer.name == "attention"]
    attention = decoder.option_values(softmax[0] if softmax else parts.spec("attention"))
    kind_of = {mixer: kind for kind, mixer in _MIXERS.items()}
    H = recurrent["num_heads"]
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["d_model"],
        "intermediate_size": 2 * parts.given(model, "d_ff"),
        "num_hidden_layers": model["num_layers"],
        "block_types": [kind_of[layer.name] for layer in specs],
        "num_attention_heads": H,
        "num_key_value_heads": attention["num_kv_heads"] or H,
        "head_dim": model["d_model"] // H,
        "lru_width": recurrent["lru_width"] or model["d_model"],
        "conv1d_width": recurrent["conv_width"],
        "attention_window_size": attention["window"] or 2048,
        **decoder.rope_fields(attention, partial=True),
        "attention_bias": attention["use_bias"],
        "hidden_activation": "gelu_pytorch_tanh",
        "logits_soft_cap": parts.given(model, "logit_softcap"),
        "rms_norm_eps": model.get("norm_eps", 1e-5),
        "tie_word_embeddings": model.get("tied_embeddings", True),
    }


def _rules(model, specs):
    yield from parts.ends(model, "model.embed_tokens", "model.final_norm")
    for i, layer in enumerate(specs):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield parts.norm(f"{theirs}.temporal_pre_norm", f"{ours}/mixer_norm")
        yield parts.norm(f"{theirs}.channel_pre_norm", f"{ours}/channel_norm")
        yield from parts.gated_mlp(f"{theirs}.mlp_block", f"{ours}/channel_mixer", bias=True)
        theirs, ours = f"{theirs}.temporal_block", f"{ours}/mixer"
        if layer.name == "attention":
            yield from decoder.attention(layer, theirs, ours)
        else:
            yield from _recurrent(theirs, ours)


def _recurrent(theirs, ours):
    names = {"linear_x": "x", "linear_y": "g", "linear_out": "o"}
    yield from parts.linears(theirs, ours, names, bias=True)
    yield from rules.conv1d(f"{theirs}.conv_1d", f"{ours}/x_conv", bias=True)
    yield rules.same(f"{theirs}.rg_lru.recurrent_param", f"{ours}/Lambda")
    for their_gate, gate in (("recurrent_gate", "r"), ("input_gate", "i")):
        for their_leaf, leaf in (("weight", "kernel"), ("bias", "bias")):
            yield rules.same(f"{theirs}.rg_lru.{their_gate}_{their_leaf}", f"{ours}/{gate}_{leaf}")


ARCHITECTURE = Architecture(
    model_type="recurrent_gemma",
    class_name="RecurrentGemmaForCausalLM",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=_rules,
    ignored=decoder.IGNORED,
)
