"""Classification of scikit-learn's handwritten digits (8x8 pixels) by an encoder of any one mixer.

    python -m experiments.train --config=configs/digits.py:mala
    python -m experiments.train --config=configs/digits.py:gated_delta_net,pixels

The argument is a registered mixer's name (`seqmodels.mixers.names()`), "attention" (softmax over
the whole image), "mlp" (an MLP of all pixels: the image is one token) or "pooling" (an MLP of each
token alone, whose outputs are averaged). A causal mixer reads each image in both directions
(`bidirectional`). Tokens are patches of 2x2 pixels; further arguments:

    pixels     one token per pixel, T = 64
    pack       four images per row
    points     the lit pixels as a set of points with coordinates
    sequence   a language model of a causal mixer reads 64 pixels and tells the digit at the last

Width, depth and budget are the same for all: about a minute on two cores. The accuracies of all
mixers are in experiments/reports/digits (`python -m experiments.bench vision`).
"""

from configs import common
from experiments.data import default_config
from seqmodels import mixers

# Options of mixers at D = 64; others run with their defaults.
OPTIONS = {
    "delta_net": "num_heads=4, head_dim=16",
    "delta_product": "num_heads=4, head_dim=16",
    "gated_delta_net": "num_heads=2, head_dim=16",
    "hgrn2": "expand_ratio=16",
    "mamba2": "head_dim=16, d_state=16",
}
BASELINES = {
    "attention": "full_attention(rope_base=100.0)",
    "mlp": "full_attention",
    "pooling": "attention(window=1)",
}
DEFAULT = "linear_attention"


def pattern(name: str) -> str:
    """Returns the pattern of an encoder's layers for a mixer's name, or a baseline's."""
    if name in BASELINES:
        return BASELINES[name]
    inner = with_options(name)
    return f"bidirectional(mixer={inner!r})" if mixers.mixer_class(name).causal else inner


def with_options(name: str) -> str:
    """Returns a mixer's name with its options for this width, as in a pattern."""
    return f"{name}({OPTIONS[name]})" if name in OPTIONS else name


def names() -> list[str]:
    """Returns the names of all baselines and mixers that are compared, each once."""
    # Wrappers are other mixers' ways to see an image, and full_attention is a baseline.
    left_out = (*BASELINES, "bidirectional", "full_attention", "ordered")
    return [*BASELINES, *(name for name in mixers.names() if name not in left_out)]


def split_argument(arg: str) -> tuple[str, str]:
    """Returns (mixer's name, further arguments) of a config's argument "name,a,b" or "a,b"."""
    first, _, rest = arg.partition(",")
    known = first in BASELINES or first in mixers.names()
    return (first, rest) if known else (DEFAULT, arg)


def get_config(arg: str = DEFAULT):
    name, argument = split_argument(arg)
    config = common.get_config()
    config.data = default_config("digits")
    config.data.update({"batch_size": 64, "eval_batch_size": 128, "patch": 2})
    config.model.update(
        {
            "architecture": "encoder",
            "pattern": pattern(name),
            "d_model": 64,
            "num_layers": 3,
            "position_embedding": "sinusoidal",
        }
    )
    config.optimizer.update({"learning_rate": 5e-3, "weight_decay": 0.05})
    config.schedule.warmup_steps = 50
    config.train.update({"steps": 400, "log_every": 50, "eval_every": 200, "eval_batches": 0})
    config.checkpoint.update({"every": 400, "keep": 1})
    if name == "mlp":
        config.data.patch = 8

    def sequence(config):
        config.data = default_config("digit_pixels")
        config.data.update({"batch_size": 64, "eval_batch_size": 128})
        config.model.update({"architecture": "language_model", "position_embedding": "none"})
        config.model.pattern = with_options(name)

    variants = {"pixels": pixels, "pack": pack, "points": points, "sequence": sequence}
    return common.with_argument(config, argument, **variants)


def pixels(config):
    """Changes the config in place to one token per pixel."""
    config.data.patch = 1


def points(config):
    """Changes the config in place to images as sets of their lit pixels."""
    config.data = default_config("digit_points")
    config.data.update({"batch_size": 64, "eval_batch_size": 128})
    config.model.grid = (8, 8)  # the space that the points lie in


def pack(config):
    """Changes the config in place to rows of four images each, as many images per step."""
    config.data.update({"pack": 4, "batch_size": 16, "eval_batch_size": 32})
