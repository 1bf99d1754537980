"""xLSTM 7B (arXiv 2503.13427): mLSTM layers, each with a SwiGLU; gates and logits soft-capped."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, parts
from seqmodels.modules.pattern import to_text

_FFN = (2.667, 64)  # factor of D, and what it is rounded up to


def _model_config(config):
    parts.refuse_unless(config, use_bias=False, add_out_norm=True, weight_mode="single")
    D = config.integer("hidden_size", 4096)
    parts.refuse_unless(config, embedding_dim=D)
    L = config.integer("num_hidden_layers", config.integer("num_blocks", 32))
    eps = config.positive("norm_eps", 1e-6)
    layer = parts.spec(
        "mlstm",
        num_heads=config.integer("num_heads", 8),
        qk_dim_factor=config.positive("qk_dim_factor", 0.5),
        v_dim_factor=config.positive("v_dim_factor", 1.0),
        gate_soft_cap=config.positive("gate_soft_cap", 15.0),
        eps=config.positive("eps", 1e-6),
        norm_eps=eps,
    )
    factor = config.positive("ffn_proj_factor", _FFN[0])
    multiple = config.integer("ffn_round_up_to_multiple_of", _FFN[1])
    return {
        "vocab_size": config.integer("vocab_size", 50_304),
        "d_model": D,
        "num_layers": L,
        "pattern": to_text([layer] * L),
        "d_ff": _ffn_width(D, factor, multiple),
        "norm_eps": eps,
        "tied_embeddings": config.flag("tie_word_embeddings", False),
        "logit_softcap": config.positive("output_logit_soft_cap", 30.0),
    }


def _ffn_width(D: int, factor: float, multiple: int) -> int:
    return int((D * factor + multiple - 1) // multiple * multiple)


def _hf_config(model, specs):
    parts.only(specs, "mlstm")
    options = parts.options_of(specs, "mlstm")
    D, F = model["d_model"], parts.given(model, "d_ff")
    # Another width than the usual factor's is one multiple of itself.
    factor, multiple = _FFN if _ffn_width(D, *_FFN) == F else (F / D, F)
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": D,
        "embedding_dim": D,
        "num_hidden_layers": model["num_layers"],
        "num_blocks": model["num_layers"],
        "num_heads": options["num_heads"],
        "qk_dim_factor": options["qk_dim_factor"],
        "v_dim_factor": options["v_dim_factor"],
        "gate_soft_cap": options["gate_soft_cap"],
        "eps": options["eps"],
        "ffn_proj_factor": factor,
        "ffn_round_up_to_multiple_of": multiple,
        "output_logit_soft_cap": parts.given(model, "logit_softcap"),
        "norm_eps": model.get("norm_eps", 1e-5),
        "use_bias": False,
        "add_out_norm": True,
        "weight_mode": "single",
        "tie_word_embeddings": model.get("tied_embeddings", True),
    }


def _rules(model, specs):
    H = parts.options_of(specs, "mlstm")["num_heads"]
    names = dict(zip("qkv", "qkv")) | {"ogate_preact": "g", "out_proj": "o"}
    yield from parts.ends(model, "backbone.embeddings", "backbone.out_norm")
    for i in range(len(specs)):
        theirs, ours = f"backbone.blocks.{i}", f"block_{i}"
        yield parts.norm(f"{theirs}.norm_mlstm", f"{ours}/mixer_norm")
        yield parts.norm(f"{theirs}.norm_ffn", f"{ours}/channel_norm")
        up = ("proj_up_gate", "proj_up", "proj_down")
        yield from parts.gated_mlp(f"{theirs}.ffn", f"{ours}/channel_mixer", names=up)
        theirs, ours = f"{theirs}.mlstm_layer", f"{ours}/mixer"
        yield from parts.linears(theirs, ours, names)
        gates = {"igate_preact": "i", "fgate_preact": "f"}
        yield from parts.linears(theirs, ours, gates, bias=True)
        yield rules.moved(
            f"{theirs}.multihead_norm.weight",
            f"{ours}/h_norm/scale",
            lambda x: x.reshape(H, -1),
            lambda x: x.reshape(-1),
        )


ARCHITECTURE = Architecture(
    model_type="xlstm",
    class_name="xLSTMForCausalLM",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=_rules,
    base_prefix="backbone.",
)
