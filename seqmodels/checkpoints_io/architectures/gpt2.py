"""GPT-2 (Radford et al., 2019) checkpoints: learned positions, LayerNorm, biases everywhere, an
ungated MLP with the tanh form of GELU.

Their matrices are stored (input, output) as ours are; those of q, k and v are one tensor.
"""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, parts
from seqmodels.modules.pattern import MixerSpec, to_text

_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu"}
_FIELDS = (
    parts.Field("vocab_size", "vocab_size", HFConfig.integer),
    parts.Field("n_embd", "d_model", HFConfig.integer),
    parts.Field("n_layer", "num_layers", HFConfig.integer),
    parts.Field("n_positions", "learned_positions", HFConfig.integer),
    parts.Field("layer_norm_epsilon", "norm_eps", HFConfig.positive, 1e-5),
    parts.Field("tie_word_embeddings", "tied_embeddings", HFConfig.flag, True),
)


def _model_config(config):
    config.require(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    model = config.options(_FIELDS)
    options = {
        "num_heads": config.integer("n_head"),
        "rope_base": None,
        "use_bias": True,
        "max_length": model["learned_positions"],
    }
    return model | {
        "pattern": to_text([MixerSpec("attention", tuple(options.items()))]),
        "channel_mixer": config.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        "d_ff": config.integer("n_inner", 4 * model["d_model"]),
        "channel_bias": True,
        "norm": "layer_norm",
    }


def _hf_config(model, specs):
    if specs[0].name != "attention":
        raise ValueError(f"GPT-2's layers are softmax attention, not {specs[0].name}")
    return parts.fields_of(model, _FIELDS) | {
        "n_head": parts.option_values(specs[0])["num_heads"],
        "n_inner": model["d_ff"],
        "activation_function": "gelu_new",
    }


def _rules(model, specs):
    D = model["d_model"]
    yield rules.same("transformer.wte.weight", "embed/embedding")
    yield rules.same("transformer.wpe.weight", "position_embedding")
    yield from _norm("transformer.ln_f", "final_norm")
    if not model["tied_embeddings"]:
        yield rules.transposed("lm_head.weight", "output/kernel")
    for i in range(len(specs)):
        theirs, ours = f"transformer.h.{i}", f"block_{i}"
        yield from _norm(f"{theirs}.ln_1", f"{ours}/mixer_norm")
        yield from _norm(f"{theirs}.ln_2", f"{ours}/channel_norm")
        for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
            qkv = [f"{ours}/mixer/{name}/{leaf}" for name in "qkv"]
            yield rules.split(f"{theirs}.attn.c_attn.{kind}", qkv, [D] * 3, axis=-1)
            yield rules.same(f"{theirs}.attn.c_proj.{kind}", f"{ours}/mixer/o/{leaf}")
            yield rules.same(f"{theirs}.mlp.c_fc.{kind}", f"{ours}/channel_mixer/up/{leaf}")
            yield rules.same(f"{theirs}.mlp.c_proj.{kind}", f"{ours}/channel_mixer/down/{leaf}")


def _norm(theirs, ours):
    yield from parts.same(theirs, f"{ours}/norm", {"weight": "scale", "bias": "bias"})


ARCHITECTURE = Architecture(
    "gpt2",
    "GPT2LMHeadModel",
    _model_config,
    _hf_config,
    _rules,
    ignored=(r".*\.attn\.(masked_)?bias",),
    base_prefix="transformer.",
)
