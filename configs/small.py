"""A small language model of any one mixer, with the same text, width, depth and budget for all.

    python -m experiments.train --config=configs/small.py:gla
    python -m experiments.train --config=configs/small.py:mamba2,smoke

The argument is the registered name of a causal mixer (`seqmodels.mixers.causal_names()`). Text and
budget are those of configs/quickstart.py.
"""

from configs import common, quickstart

# Options that make a mixer about as wide as the others at D = 128; others run with their defaults.
OPTIONS = {
    "attention": "num_heads=4",
    "delta_net": "num_heads=4, head_dim=32",
    "delta_product": "num_heads=4, head_dim=32",
    "gated_delta_net": "num_heads=2, head_dim=32",
    "hgrn2": "expand_ratio=32",
    "mamba2": "head_dim=32, d_state=32",
    "mlp_mixer_causal": "max_length=256",
    "shallow_ffn_causal": "max_length=16, size='m'",
    "sparse_mlp_causal": "max_length=256",
    "transnormer": "num_heads=4",
}


def get_config(arg: str = "gated_delta_net"):
    mixer, _, argument = arg.partition(",")
    config = quickstart.get_config()
    config.model.pattern = f"{mixer}({OPTIONS.get(mixer, '')})"
    # Published stacks of Mamba have no channel mixer, and twice the layers.
    if mixer.startswith("mamba"):
        config.model.channel_mixer = None
        config.model.num_layers *= 2
    return common.with_argument(config, argument)
