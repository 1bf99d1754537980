"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, biases everywhere, an ungated MLP
with the tanh form of GELU.

Its projections are stored (input, output) as ours are, with q, k and v as one.
"""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, decoder
from seqmodels.modules.pattern import to_text

_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu"}


def _model_config(config):
    config.require("scale_attn_weights", True)
    config.require("scale_attn_by_inverse_layer_idx", False)
    config.require("add_cross_attention", False)
    D, context = config.integer("n_embd"), config.integer("n_positions")
    L, H = config.integer("n_layer"), config.integer("n_head")
    options = {"num_heads": H, "rope_base": None, "use_bias": True, "max_length": context}
    return {
        "vocab_size": config.integer("vocab_size"),
        "d_model": D,
        "num_layers": L,
        "pattern": to_text([decoder.spec(**options)]),
        "channel_mixer": config.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        "d_ff": config.integer("n_inner", 4 * D),
        "channel_bias": True,
        "norm": "layer_norm",
        "norm_eps": config.positive("layer_norm_epsilon", 1e-5),
        "learned_positions": context,
        "tied_embeddings": config.flag("tie_word_embeddings", True),
    }


def _hf_config(model, specs):
    if specs[0].name != "attention":
        raise ValueError(f"GPT-2's layers are softmax attention, not {specs[0].name}")
    return {
        "vocab_size": model["vocab_size"],
        "n_embd": model["d_model"],
        "n_layer": model["num_layers"],
        "n_head": decoder.option_values(specs[0])["num_heads"],
        "n_positions": model["learned_positions"] or 0,
        "n_inner": model["d_ff"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model["norm_eps"],
        "tie_word_embeddings": model["tied_embeddings"],
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
        for kind, part in (("weight", "kernel"), ("bias", "bias")):
            qkv = [f"{ours}/mixer/{n}/{part}" for n in "qkv"]
            yield rules.split(f"{theirs}.attn.c_attn.{kind}", qkv, [D] * 3, False, axis=-1)
            yield rules.same(f"{theirs}.attn.c_proj.{kind}", f"{ours}/mixer/o/{part}")
            yield rules.same(f"{theirs}.mlp.c_fc.{kind}", f"{ours}/channel_mixer/up/{part}")
            yield rules.same(f"{theirs}.mlp.c_proj.{kind}", f"{ours}/channel_mixer/down/{part}")


def _norm(theirs, ours):
    yield rules.same(f"{theirs}.weight", f"{ours}/norm/scale")
    yield rules.same(f"{theirs}.bias", f"{ours}/norm/bias")


ARCHITECTURE = Architecture(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=_rules,
    ignored=(r".*\.attn\.(masked_)?bias",),
    base_prefix="transformer.",
)
