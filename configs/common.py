"""The fields of every config, and their defaults.

The value of a field is the last of: its default here; what configs/<name>.py sets; what that
config's argument sets (`quickstart.py:smoke`); --config.x.y=value, of the type that the field has
here: 3, 1e-3, true, text, "(1.0, 0.5)", or None where this text says so.

    seed        seeds the first parameters and the sample. data.seed seeds the order of the data
    data        a dataset and its options: experiments.data.default_config(name)
    model       the fields of seqmodels.language_model.LanguageModel, seqmodels.encoder.Encoder and
                seqmodels.denoiser.Denoiser, whose docstrings say more. A config has to set pattern,
                num_layers and d_model; fields of another architecture stay at their defaults.
        architecture        language_model, encoder, denoiser
        pattern             mixers of the layers: "3*gated_delta_net + attention(window=256)"
        num_layers          number of layers, through which the pattern repeats
        d_model             width
        channel_mixer       swiglu, geglu, sglu, gelu, "moe(num_experts=8)", and of encoders and
                            denoisers conv_gelu, conv_swiglu; None: no channel mixer
        d_ff                width of the channel mixer; None: the default of its kind
        channel_bias        whether its projections have biases
        norm, norm_eps      rms_norm, layer_norm, srms_norm, zero_centred_rms_norm, and of encoders
                            and denoisers batch_norm, rep_bn, "prepbn(steps=300)"
        norm_position       pre, post, sandwich, residual
        mixer_residual, channel_residual    (a, b) of x <- a x + b f(x)
        float32_residual    whether the residual stream is float32, whatever dtype is (Mamba)
        remat               what the backward pass recomputes: none, full, operators, dots
        scan_layers         whether a repeated group of layers is compiled once
        dtype, param_dtype  of activations and of parameters: float32, bfloat16, float16
      of language models and encoders
        vocab_size          number of token ids; 0: the dataset's, whose inputs may be patches
      of language models
        tied_embeddings     whether the output matrix is the embedding
        embedding_scale     factor of the embedded tokens
        learned_positions   number of positions that have a learned vector; None: no such vectors
        logit_softcap       c of c tanh(logits / c); None: no cap
      of encoders and denoisers
        num_classes, input_dim    number of classes, channels per patch; 0: the dataset's
        grid                sizes of the axes of a document's tokens, "(8, 8)"; None: the dataset's
        position_embedding  none, per_axis, per_token, sinusoidal, md_tpe
        position_conv       taps of a depthwise convolution before each mixer; None: no such one
      of encoders
        pooling             mean (a class per document), token (a class per token)
      of denoisers
        objective           velocity, noise
        noise_schedule      of the objective noise: linear, cosine
        learn_variance      whether a variance is predicted too (objective noise)
    optimizer
        name                adamw, lamb, lion, muon, schedule_free, sgd
        learning_rate, weight_decay    gates, norms and biases are never decayed
        b1, b2, eps         of Adam, also in lamb, schedule_free and Adam's part of muon. lion uses
                            b1 and b2, and sgd b1, its momentum
        clip                largest global norm of the gradient; 0: any
    schedule    name (constant, linear, power, rex, warmup_cosine, wsd), warmup_steps,
                final_fraction, decay_fraction, power_a, power_b: see experiments.training.schedules
    train
        steps               number of updates
        log_every           number of steps between rows of metrics
        eval_every, eval_batches    steps between scores of the validation split, and how many of
                            its batches are scored; 0: all
        test_batches        batches of the test split, which is scored at the end; 0: all
        accumulate          microbatches per step
        z_loss              weight of the mean of (log Z)^2 in the loss
    checkpoint  every: number of steps between checkpoints; keep: how many of the latest stay
    mesh        sizes of the axes pipe, data, fsdp, seq, tensor (seqmodels.sharding); -1: the rest
    parallel    how the axes are used (seqmodels.sharding.Options): collective of states along
                seq, zero, offload, and the pipeline's microbatches and split_backward
    sample      prompt, length and temperature of a text generated at the end; length 0: none
    tensorboard, wandb   True, and the name of a project, write metrics there (extra packages of
                the same names)
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, get_args, get_origin

from ml_collections import ConfigDict, FieldReference

from experiments.data import DATASETS, default_config
from seqmodels import models, sharding


def get_config() -> ConfigDict:
    """Returns a config in which every field has its default."""
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    fields = models.config_fields()
    config.model = ConfigDict({name: _typed(*field) for name, field in fields.items()})
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
    """Returns a field's default, as a reference that keeps the type `kind` where it may be None."""
    if NoneType not in get_args(kind) and default is not None:
        return default
    plain = [get_origin(part) or part for part in get_args(kind) or (kind,)]
    kinds = [*plain, int] if float in plain else plain
    return FieldReference(default, functools.reduce(operator.or_, kinds))


RENAMED = {("parallel", "exchange"): "collective"}  # fields by the names that older runs saved


def with_defaults(fields: Mapping[str, Any]) -> ConfigDict:
    """Returns a saved config with defaults for missing fields, and the type of every field."""
    config = get_config()
    fields = {
        section: {RENAMED.get((section, name), name): value for name, value in values.items()}
        if isinstance(values, Mapping)
        else values
        for section, values in fields.items()
    }
    if (name := fields.get("data", {}).get("name")) in DATASETS:
        config.data = default_config(name)
    with config.ignore_type():
        config.update(fields)
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """Shrinks a config in place to a few steps of a tiny model, which take seconds; returns it."""
    config.train.update(
        {"steps": 4, "log_every": 1, "eval_every": 2, "eval_batches": 1, "test_batches": 1}
    )
    config.schedule.warmup_steps = min(config.schedule.warmup_steps, 2)
    config.checkpoint.every = 2
    if config.data.name in ("text", "tfds"):  # which need files of the user's
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
    """Returns the config, changed in place by the argument "a,b" of --config=configs/x.py:a,b.

    variants: name -> function that changes the config in place. Every config has "smoke", too.
    Raises ValueError for an unknown name in the argument.
    """
    known = variants | {"smoke": smoke}
    for name in filter(None, argument.split(",")):
        if name not in known:
            raise ValueError(f"unknown config argument {name!r}; choose one of {', '.join(known)}")
        known[name](config)
    return config
