"""xLSTM 7B (arXiv 2503.13427) checkpoints: mLSTM layers with SwiGLUs, soft-capped gates and
logits."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, parts
from seqmodels.modules.pattern import to_text

_FFN = (2.667, 64)  # factor of D, and what it is rounded up to
_REQUIRED = {"use_bias": False, "add_out_norm": True, "weight_mode": "single"}
_MODEL = (
    *parts.model_fields("norm_eps", vocab_size=50_304, d_model=4096, norm_eps=1e-6),
    parts.Field("output_logit_soft_cap", "logit_softcap", HFConfig.positive, 30.0),
)
_MLSTM = (
    parts.Field("num_heads", "num_heads", HFConfig.integer, 8),
    parts.Field("qk_dim_factor", "qk_dim_factor", HFConfig.positive, 0.5),
    parts.Field("v_dim_factor", "v_dim_factor", HFConfig.positive, 1.0),
    parts.Field("gate_soft_cap", "gate_soft_cap", HFConfig.positive, 15.0),
    parts.Field("eps", "eps", HFConfig.positive, 1e-6),
)


def _model_config(config):
    config.require(**_REQUIRED)
    config = config.with_defaults(num_hidden_layers=config.integer("num_blocks", 32))
    model = config.options(_MODEL)
    config.require(embedding_dim=model["d_model"])
    layer = parts.spec("mlstm", **config.options(_MLSTM), norm_eps=model["norm_eps"])
    factor = config.positive("ffn_proj_factor", _FFN[0])
    multiple = config.integer("ffn_round_up_to_multiple_of", _FFN[1])
    width = _ffn_width(model["d_model"], factor, multiple)
    return model | {"pattern": to_text([layer]), "d_ff": width}


def _ffn_width(D: int, factor: float, multiple: int) -> int:
    return int((D * factor + multiple - 1) // multiple * multiple)


def _hf_config(model, specs):
    parts.only(specs, "mlstm")
    D, F = model["d_model"], parts.given(model, "d_ff")
    # Another width than the usual factor's is one multiple of itself.
    factor, multiple = _FFN if _ffn_width(D, *_FFN) == F else (F / D, F)
    return {
        **_REQUIRED,
        **parts.fields_of(model, _MODEL),
        **parts.fields_of(parts.options_of(specs, "mlstm"), _MLSTM),
        "embedding_dim": D,
        "num_blocks": model["num_layers"],
        "ffn_proj_factor": factor,
        "ffn_round_up_to_multiple_of": multiple,
    }


def _rules(model, specs):
    H = parts.options_of(specs, "mlstm")["num_heads"]
    mlp = {"proj_up_gate": "gate", "proj_up": "up", "proj_down": "down"}
    names = dict(zip("qkv", "qkv")) | {"ogate_preact": "g", "out_proj": "o"}
    gates = {"igate_preact": "i", "fgate_preact": "f"}
    by_head = rules.Move(lambda x: x.reshape(H, -1), lambda x: x.reshape(-1))
    yield from parts.ends(model, "backbone.embeddings", "backbone.out_norm")
    for i in range(len(specs)):
        theirs, ours = f"backbone.blocks.{i}", f"block_{i}"
        yield from parts.block_norms(theirs, ours, "norm_mlstm", "norm_ffn")
        yield from parts.linears(f"{theirs}.ffn", f"{ours}/channel_mixer", mlp)
        theirs, ours = f"{theirs}.mlstm_layer", f"{ours}/mixer"
        yield from parts.linears(theirs, ours, names)
        yield from parts.linears(theirs, ours, gates, bias=True)
        yield rules.moved(f"{theirs}.multihead_norm.weight", f"{ours}/h_norm/scale", by_head)


ARCHITECTURE = Architecture(
    "xlstm", "xLSTMForCausalLM", _model_config, _hf_config, _rules, base_prefix="backbone."
)
