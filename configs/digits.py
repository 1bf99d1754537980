"""Classification of scikit-learn's handwritten digits (8x8 pixels) by an encoder of any one mixer.

    python -m experiments.train --config=configs/digits.py:mala
    python -m experiments.train --config=configs/digits.py:gated_delta_net,pixels

The argument is a registered mixer's name (`seqmodels.mixers.names()`), "attention" (softmax over
the whole image), "mlp" (an MLP of all pixels: the image is one token) or "pooling" (an MLP of each
token alone, whose outputs are averaged). A causal mixer reads each image in both directions
(`bidirectional`). Tokens are patches of 2x2 pixels; further arguments: pixels for one token per
pixel, T = 64; points for one per lit pixel, with coordinates (`lion`); pack for four images per
row. Width, depth and budget are the same for all: about a minute on two cores. docs/results.md has
each mixer's accuracy.
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
    options = OPTIONS.get(name, "")
    if not mixers.mixer_class(name).causal:
        return f"{name}({options})"
    inner = f"{name}({options})" if options else name
    return f"bidirectional(mixer={inner!r})"


def names() -> list[str]:
    """Returns the names of all mixers and baselines that the first argument may be."""
    wrappers = ("bidirectional", "ordered")
    return [*BASELINES, *(name for name in mixers.names() if name not in (*BASELINES, *wrappers))]


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
    return common.with_argument(config, argument, pixels=pixels, points=points, pack=pack)


def pixels(config):
    """Changes the config in place to one token per pixel."""
    config.data.patch = 1


def points(config):
    """Changes the config in place to sets of points: a token per lit pixel, with coordinates."""
    sizes = {name: config.data[name] for name in ("batch_size", "eval_batch_size")}
    with config.unlocked():
        config.data = default_config("digit_points")
    config.data.update(sizes)
    config.model.position_embedding = "none"


def pack(config):
    """Changes the config in place to rows of four images each, as many images per step."""
    config.data.update({"pack": 4, "batch_size": 16, "eval_batch_size": 32})
