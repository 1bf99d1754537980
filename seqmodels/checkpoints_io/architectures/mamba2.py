"""Mamba-2 (Dao & Gu, arXiv 2405.21060), as transformers' Mamba2ForCausalLM has it."""

from seqmodels.checkpoints_io.architectures import Architecture, parts
from seqmodels.modules.pattern import to_text


def _model_config(config):
    parts.refuse_unless(config, hidden_act="silu")
    parts.no_time_step_limit(config)
    D, expand = config.integer("hidden_size", 4096), config.integer("expand", 2)
    heads, dim = config.integer("num_heads", 128), config.integer("head_dim", 64)
    parts.check_mamba2_width(config, D, expand, heads, dim)
    eps = config.number("layer_norm_epsilon", 1e-5)
    layer = parts.spec(
        "mamba2",
        expand=expand,
        head_dim=dim,
        d_state=config.integer("state_size", 128),
        num_groups=config.integer("n_groups", 8),
        conv_width=config.integer("conv_kernel", 4),
        use_bias=config.flag("use_bias", False),
        conv_bias=config.flag("use_conv_bias", True),
        norm_eps=eps,
    )
    L = config.integer("num_hidden_layers")
    return {
        "vocab_size": config.integer("vocab_size"),
        "d_model": D,
        "num_layers": L,
        "pattern": to_text([layer] * L),
        "channel_mixer": None,
        "norm_eps": eps,
        "float32_residual": config.flag("residual_in_fp32", True),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
    }


def _hf_config(model, specs):
    parts.only(specs, "mamba2")
    options = parts.options_of(specs, "mamba2")
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["num_layers"],
        "expand": options["expand"],
        "num_heads": options["expand"] * model["d_model"] // options["head_dim"],
        "head_dim": options["head_dim"],
        "state_size": options["d_state"],
        "n_groups": options["num_groups"],
        "conv_kernel": options["conv_width"],
        "use_bias": options["use_bias"],
        "use_conv_bias": options["conv_bias"],
        "hidden_act": "silu",
        "layer_norm_epsilon": model.get("norm_eps", 1e-5),
        "residual_in_fp32": model.get("float32_residual", False),
        "tie_word_embeddings": model.get("tied_embeddings", True),
    }


def _rules(model, specs):
    yield from parts.ends(model, "backbone.embeddings", "backbone.norm_f")
    for i, layer in enumerate(specs):
        theirs = f"backbone.layers.{i}"
        yield parts.norm(f"{theirs}.norm", f"block_{i}/mixer_norm")
        yield from parts.mamba2(layer, model["d_model"], f"{theirs}.mixer", f"block_{i}/mixer")


ARCHITECTURE = Architecture(
    model_type="mamba2",
    class_name="Mamba2ForCausalLM",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=_rules,
    base_prefix="backbone.",
)
