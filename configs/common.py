"""The fields every config has, and their defaults. A config changes what it means to, and fills in `data` and `model`.

A value is settled in this order, later wins: here; configs/<name>.py; its argument (`quickstart.py:smoke`); --config.x.y=value, of
the type that the field has here: 3, 1e-3, true, text, "(1.0, 0.5)", and None where it says "None".

    seed        of the first parameters and of the sample; data.seed is the order of the data
    data        experiments.data.default_config(name): what a dataset's name is, and its options
    model       seqmodels.language_model.LanguageModel's fields, and documented there, with dtypes by name and two in place of `mixers`:
                  pattern          the layers' mixers and their options: "3*gated_delta_net + attention(window=256)"
                  num_layers       of the pattern, gone over again and again
                  d_model          width; a config has to say these three
                  vocab_size       0 is the dataset's
                  channel_mixer    swiglu, geglu, sglu, gelu, "moe(num_experts=8)" (seqmodels.channel_mixers), None for none
                  d_ff             width of the channel mixer; None is what its kind takes.   channel_bias: whether it has biases
                  norm, norm_eps   rms_norm, layer_norm, srms_norm, zero_centred_rms_norm (seqmodels.norms)
                  norm_position    pre, post, sandwich, residual.   mixer_residual, channel_residual: (a, b) of x <- a x + b f(x)
                  tied_embeddings  the output matrix is the embedding.   embedding_scale: what embedded tokens are multiplied by
                  learned_positions, logit_softcap   how many, and of which size; None for none
                  remat            none, full, operators, dots: what the backward pass recomputes
                  scan_layers      compile a repeated group of layers once
                  dtype, param_dtype   of activations and products, of parameters: float32, bfloat16, float16
    optimizer   name: adamw, lamb, lion, muon, schedule_free, sgd; learning_rate; weight_decay of matrices; clip is of the global gradient
                norm (0: none). b1, b2, eps are Adam's, and the same in lamb, in schedule_free and in what muon leaves to Adam; lion
                reads b1 and b2, sgd b1: its momentum
    schedule    name: constant, linear, power, rex, warmup_cosine, wsd; warmup_steps, final_fraction, decay_fraction, power_a, power_b: see
                experiments.schedules
    train       steps; every how many steps metrics are logged (log_every) and the validation split is scored (eval_every), and on
                how many batches of it (eval_batches; 0: all); test_batches likewise at the end; accumulate: microbatches a step;
                z_loss: weight of the mean of (log Z)^2
    checkpoint  every how many steps, and how many of the latest to keep
    mesh        seqmodels.sharding: sizes of pipe, data, fsdp, seq, tensor; -1 is what is left
    parallel    how they are used: exchange of states along seq, zero, offload, and the pipeline's microbatches and
                split_backward; see seqmodels.sharding.Options
    sample      what to generate at the end of a text run: prompt, length (0: nothing), temperature
    tensorboard, wandb   True, and a project's name, write there too (extras of the same names)
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, get_args

from ml_collections import ConfigDict, FieldReference

from experiments.data import DATASETS, default_config
from seqmodels import language_model, sharding


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    fields = language_model.config_fields()
    config.model = ConfigDict({name: _typed(*field) for name, field in fields.items()})
    config.model.vocab_size = 0
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


def _typed(kind: Any, default: Any) -> Any:
    """A field's default; where the value may be None, with the type that other values have."""
    if NoneType not in get_args(kind) and default is not None:
        return default
    return FieldReference(default, kind | int if float in get_args(kind) else kind)


def with_defaults(fields: Mapping[str, Any]) -> ConfigDict:
    """A config that was saved: its values, the defaults of what an older one has not, and every field's type."""
    config = get_config()
    if (name := fields.get("data", {}).get("name")) in DATASETS:
        config.data = default_config(name)
    with config.ignore_type():
        config.update(fields)
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
    if config.model.d_ff:
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
