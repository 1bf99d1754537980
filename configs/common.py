"""The fields every config has, and their defaults. A config changes what it means to, and fills in `data` and `model`.

A value is settled in this order, later wins: here; configs/<name>.py; its argument (`quickstart.py:smoke`); --config.x.y=value.

    data        experiments.data.default_config(name)
    model       seqmodels.language_model.from_config: pattern, num_layers, d_model, ...; vocab_size 0 is the dataset's
    optimizer   name: adamw, lamb, lion, muon, schedule_free, sgd; clip is of the global gradient norm (0: none)
    schedule    name: constant, linear, power, rex, warmup_cosine, wsd; see experiments.schedules
    train       steps; every how many steps metrics are logged and the validation split is scored, and on how many
                batches of it (0: all); test_batches likewise at the end; accumulate: microbatches a step
    checkpoint  every how many steps, and how many of the latest stay
    mesh        seqmodels.sharding: sizes of pipe, data, fsdp, seq, tensor; -1 is what is left
    parallel    how they are used: exchange of states along seq, zero, offload, and the pipeline's microbatches and
                split_backward; see seqmodels.sharding.Options
    sample      what to generate at the end of a text run; length 0: nothing
    tensorboard, wandb   True, and a project's name, write there too (extras of the same names)
"""

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from experiments.data import default_config
from seqmodels import sharding


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.model = ConfigDict({"vocab_size": 0})
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-3,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip": 1.0,
        }
    )
    config.schedule = ConfigDict(
        {
            "name": "warmup_cosine",
            "warmup_steps": 100,
            "final_fraction": 0.1,
            "decay_fraction": 0.1,
            "power_a": 4.0,
            "power_b": -0.51,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 1000,
            "log_every": 10,
            "eval_every": 200,
            "eval_batches": 16,
            "test_batches": 0,
            "accumulate": 1,
            "z_loss": 0.0,
        }
    )
    config.checkpoint = ConfigDict({"every": 200, "keep": 2})
    config.mesh = ConfigDict({"pipe": 1, "data": -1, "fsdp": 1, "seq": 1, "tensor": 1})
    config.parallel = ConfigDict(dataclasses.asdict(sharding.Options()))
    config.sample = ConfigDict({"prompt": "", "length": 300, "temperature": 0.8})
    config.tensorboard = False
    config.wandb = ""
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """Shrinks any config, in place, to a few steps of a tiny model that run in seconds. Returns it."""
    config.train.update(
        {"steps": 4, "log_every": 1, "eval_every": 2, "eval_batches": 1, "test_batches": 1}
    )
    config.schedule.warmup_steps = min(config.schedule.warmup_steps, 2)
    config.checkpoint.every = 2
    if config.data.name in ("text", "tfds"):  # no files of the user's are asked for
        config.data = default_config("python_stdlib")
        config.model.vocab_size = 0
    config.data.batch_size = 8 * config.train.accumulate
    config.data.eval_batch_size = 0
    if "seq_len" in config.data:
        config.data.seq_len = min(config.data.seq_len, 64)
    if "eval_examples" in config.data:
        config.data.eval_examples = 8
    d_model = min(config.model.d_model, 64)
    if config.model.get("d_ff"):
        config.model.d_ff = max(config.model.d_ff * d_model // config.model.d_model // 8 * 8, 8)
    config.model.d_model = d_model
    config.model.num_layers = min(config.model.num_layers, 4)
    config.sample.length = min(config.sample.length, 8)
    return config


def with_argument(config: ConfigDict, argument: str, **variants: Callable[[ConfigDict], None]):
    """Applies what stands behind the colon of --config=configs/x.py:a,b and returns the config.

    Each of `variants` changes the config in place; "smoke" is one that every config has.
    """
    known = variants | {"smoke": smoke}
    for name in filter(None, argument.split(",")):
        if name not in known:
            raise ValueError(f"unknown config argument {name!r}; choose one of {', '.join(known)}")
        known[name](config)
    return config
