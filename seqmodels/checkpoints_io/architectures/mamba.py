"""Mamba (Gu & Dao, arXiv 2312.00752), as transformers' MambaForCausalLM has it."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, parts
from seqmodels.modules.pattern import to_text


def _model_config(config):
    parts.refuse_unless(config, hidden_act="silu")
    D = config.integer("hidden_size")
    rank = config.get("time_step_rank", "auto")
    layer = parts.spec(
        "mamba",
        expand=config.integer("expand", 2),
        d_state=config.integer("state_size", 16),
        dt_rank=-(-D // 16) if rank == "auto" else config.integer("time_step_rank"),
        conv_width=config.integer("conv_kernel", 4),
        use_bias=config.flag("use_bias", False),
        conv_bias=config.flag("use_conv_bias", True),
    )
    L = config.integer("num_hidden_layers")
    return {
        "vocab_size": config.integer("vocab_size"),
        "d_model": D,
        "num_layers": L,
        "pattern": to_text([layer] * L),
        "channel_mixer": None,
        "norm_eps": config.positive("layer_norm_epsilon", 1e-5),
        "float32_residual": config.flag("residual_in_fp32", True),
        "tied_embeddings": config.flag("tie_word_embeddings", True),
    }


def _hf_config(model, specs):
    parts.only(specs, "mamba")
    options = parts.options_of(specs, "mamba")
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["num_layers"],
        "expand": options["expand"],
        "intermediate_size": options["expand"] * model["d_model"],
        "state_size": options["d_state"],
        "time_step_rank": options["dt_rank"] or -(-model["d_model"] // 16),
        "conv_kernel": options["conv_width"],
        "use_bias": options["use_bias"],
        "use_conv_bias": options["conv_bias"],
        "hidden_act": "silu",
        "layer_norm_epsilon": model.get("norm_eps", 1e-5),
        "residual_in_fp32": model.get("float32_residual", False),
        "tie_word_embeddings": model.get("tied_embeddings", True),
    }


def _rules(model, specs):
    options = parts.options_of(specs, "mamba")
    E, K = options["expand"] * model["d_model"], options["d_state"]
    R = options["dt_rank"] or -(-model["d_model"] // 16)
    yield from parts.ends(model, "backbone.embeddings", "backbone.norm_f")
    for i in range(len(specs)):
        theirs, ours = f"backbone.layers.{i}", f"block_{i}/mixer"
        yield parts.norm(f"{theirs}.norm", f"block_{i}/mixer_norm")
        theirs += ".mixer"
        widths = {"x": E, "z": E}
        yield from parts.packed_linear(f"{theirs}.in_proj", ours, widths, options["use_bias"])
        yield from rules.conv1d(f"{theirs}.conv1d", f"{ours}/x_conv", options["conv_bias"])
        yield from parts.packed_linear(f"{theirs}.x_proj", ours, {"dt_low_rank": R, "B": K, "C": K})
        yield rules.transposed(f"{theirs}.dt_proj.weight", f"{ours}/dt/kernel")
        yield rules.same(f"{theirs}.dt_proj.bias", f"{ours}/dt_bias")
        yield rules.same(f"{theirs}.A_log", f"{ours}/A_log")
        yield rules.same(f"{theirs}.D", f"{ours}/D")
        yield from rules.linear(f"{theirs}.out_proj", f"{ours}/o", options["use_bias"])


ARCHITECTURE = Architecture(
    model_type="mamba",
    class_name="MambaForCausalLM",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=_rules,
    base_prefix="backbone.",
)
