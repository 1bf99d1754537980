"""Helpers that families of models share: conversion rules, and tables of config.json's fields.

In functions that yield rules, `theirs` is a prefix of tensor names in the published layout, and
`ours` a path of parameters in our model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqmodels import mixers
from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import HFConfig
from seqmodels.modules import channel_mixers
from seqmodels.modules.pattern import MixerSpec, to_text

_MOST_EXPERTS = 4096
MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


class Field(NamedTuple):
    """A field of config.json that holds one option of our models.

    theirs, ours: names of the field and the option. read: the method of HFConfig that reads it.
    default: the value of an absent or null field; None makes such a field an error.
    """

    theirs: str
    ours: str
    read: Callable[[HFConfig, str, Any], Any]
    default: Any = None


def given(values: Mapping[str, Any], name: str) -> Any:
    """Returns `values[name]`, which config.json must state; raises ValueError if it is None."""
    if values.get(name) is None:
        raise ValueError(f"this layout needs {name}; set it in config.model or in its pattern")
    return values[name]


def fields_of(values: Mapping[str, Any], table: Iterable[Field]) -> dict[str, Any]:
    """Returns config.json's fields for our options `values`; inverts `HFConfig.options`."""
    return {field.theirs: given(values, field.ours) for field in table}


def model_fields(eps: str, **defaults) -> tuple[Field, ...]:
    """Returns the fields of every family: vocabulary, width, depth, norm epsilon, tied embeddings.

    eps: config.json's name of the norms' epsilon.
    defaults: what the family's library takes for absent fields, by our names. It has `norm_eps`.
    """
    integer, get = HFConfig.integer, defaults.get
    return (
        Field("vocab_size", "vocab_size", integer, get("vocab_size")),
        Field("hidden_size", "d_model", integer, get("d_model")),
        Field("num_hidden_layers", "num_layers", integer, get("num_layers")),
        Field(eps, "norm_eps", HFConfig.positive, defaults["norm_eps"]),
        Field(
            "tie_word_embeddings", "tied_embeddings", HFConfig.flag, get("tied_embeddings", False)
        ),
    )


D_FF = Field("intermediate_size", "d_ff", HFConfig.integer)


def spec(name: str, **options) -> MixerSpec:
    """Returns a layer's MixerSpec: the mixer `name` with those options that are not None."""
    return MixerSpec(name, tuple((k, v) for k, v in options.items() if v is not None))


def option_values(layer: MixerSpec) -> dict[str, Any]:
    """Returns all options of a layer's mixer; those that its spec omits have their defaults."""
    return mixers.options(layer.name) | dict(layer.options)


def options_of(specs: Sequence[MixerSpec], name: str, optional: bool = False) -> dict[str, Any]:
    """Returns all options, defaults included, of the first layer whose mixer is `name`.

    Without such a layer, returns the mixer's defaults if `optional`, and else raises ValueError.
    """
    for layer in specs:
        if layer.name == name:
            return option_values(layer)
    if not optional:
        raise ValueError(f"this layout needs a layer of {name}; the model has none")
    return mixers.options(name)


def only(specs: Sequence[MixerSpec], *names: str) -> None:
    """Raises ValueError if a layer has a mixer that is not in `names`, those of this layout."""
    if others := sorted({s.name for s in specs} - set(names)):
        raise ValueError(f"only {' and '.join(names)} have a place in this layout, not {others[0]}")


def experts_text(config: HFConfig, table: Sequence[Field]) -> str:
    """Returns config.json's mixture of experts as a channel mixer's text, "moe(...)".

    table: fields that are options of the mixture. More than 4096 experts raise a ValueError.
    """
    options = config.options(table)
    if options["num_experts"] > _MOST_EXPERTS:
        field = next(f.theirs for f in table if f.ours == "num_experts")
        raise ValueError(
            f"{config.name}: {field} is {options['num_experts']}; at most {_MOST_EXPERTS} are supported"
        )
    return to_text([spec("moe", **options)])


def experts_of(text: str | None) -> channel_mixers.MixtureOfExperts | None:
    """Returns the MixtureOfExperts that `text` describes, or None for another channel mixer."""
    module = channel_mixers.make(text or "swiglu", parent=None)
    return module if isinstance(module, channel_mixers.MixtureOfExperts) else None


def no_time_step_limit(config: HFConfig) -> None:
    """Raises ValueError if config.json bounds Mamba-2's step size dt, which we do not support."""
    limit = config.get("time_step_limit", [0.0, float("inf")])
    # transformers 5 writes what JSON has no number for as an object.
    if limit not in ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]):
        raise ValueError(
            f"{config.name}: time_step_limit is {limit!r}; only [0, Infinity] is supported"
        )


def check_mamba2_width(config: HFConfig, D: int, options: Mapping[str, Any], heads: int) -> None:
    """Raises ValueError unless a Mamba-2 mixer's heads * head_dim = expand * D."""
    expand, dim = options["expand"], options["head_dim"]
    if expand * D != heads * dim:
        raise ValueError(
            f"{config.name}: {heads} heads of {dim} are not expand * hidden_size = {expand * D}"
        )


def ends(model: Mapping[str, Any], embedding: str, last_norm: str) -> Iterator[rules.Rule]:
    """Yields the conversion rules for the embedding, the last norm and, if not tied, lm_head."""
    yield rules.same(f"{embedding}.weight", "embed/embedding")
    yield norm(last_norm, "final_norm")
    if not model["tied_embeddings"]:
        yield rules.transposed("lm_head.weight", "output/kernel")


def norm(theirs: str, ours: str) -> rules.Rule:
    """Returns the conversion rule for a norm's gain, which is copied."""
    return rules.same(f"{theirs}.weight", f"{ours}/scale")


def block_norms(theirs: str, ours: str, mixer: str, channel: str) -> Iterator[rules.Rule]:
    """Yields the conversion rules for the norms before a layer's mixer and its channel mixer."""
    yield norm(f"{theirs}.{mixer}", f"{ours}/mixer_norm")
    yield norm(f"{theirs}.{channel}", f"{ours}/channel_norm")


def same(theirs: str, ours: str, names: Mapping[str, str]) -> Iterator[rules.Rule]:
    """Yields rules that copy a module's tensors unchanged; names: {published name: our name}."""
    for their_name, our_name in names.items():
        yield rules.same(f"{theirs}.{their_name}", f"{ours}/{our_name}")


def linears(
    theirs: str, ours: str, names: Mapping[str, str], bias: bool = False
) -> Iterator[rules.Rule]:
    """Yields the conversion rules for nn.Linear layers; names: {published name: our name}."""
    for their_name, our_name in names.items():
        yield from rules.linear(f"{theirs}.{their_name}", f"{ours}/{our_name}", bias)


def packed_heads(
    name: str, ours: str, heads: int, widths: Mapping[str, int], bias: bool = False
) -> Iterator[rules.Rule]:
    """Yields rules that cut an nn.Linear whose outputs are grouped by head into our projections.

    widths: {our projection: features per head}, in the order in which each head has them.
    """
    ends = np.cumsum(list(widths.values()))

    def into(x):
        by_head = x.reshape(heads, ends[-1], *x.shape[1:])
        cut = np.split(by_head, ends[:-1], axis=1)
        return [part.reshape(-1, *x.shape[1:]).T for part in cut]

    def out(*own):
        cut = [part.T.reshape(heads, -1, *part.shape[:-1]) for part in own]
        whole = np.concatenate(cut, axis=1)
        return (whole.reshape(-1, *whole.shape[2:]),)

    for kind, leaf in (("weight", "kernel"), ("bias", "bias"))[: 1 + bias]:
        paths = tuple(f"{ours}/{own}/{leaf}" for own in widths)
        yield rules.Rule((f"{name}.{kind}",), paths, into, out)


def experts(theirs: str, ours: str, count: int, names: Sequence[str]) -> Iterator[rules.Rule]:
    """Yields rules that stack the matrices of all experts, which are SwiGLUs, to one parameter per
    kind.

    The tensors are `{theirs}.{e}.{name}.weight` for e < count; names: those of gate, up and down.
    """
    for their_name, our_name in zip(names, ("gate", "up", "down")):
        yield rules.Rule(
            tuple(f"{theirs}.{e}.{their_name}.weight" for e in range(count)),
            (f"{ours}/{our_name}_kernel",),
            lambda *parts: (np.stack([part.T for part in parts]),),
            lambda x: tuple(part.T for part in x),
        )


def mamba2(layer: MixerSpec, d_model: int, theirs: str, ours: str) -> Iterator[rules.Rule]:
    """Yields the conversion rules for a Mamba-2 layer in the names of transformers' models."""
    options = option_values(layer)
    E, V = options["expand"] * d_model, options["head_dim"]
    width = options["num_groups"] * options["d_state"]
    bias = options["use_bias"]
    features = {"z": E, "x": E, "B": width, "C": width, "dt": E // V}
    yield from rules.packed(f"{theirs}.in_proj", ours, features, bias)
    channels = {"x_conv": E, "B_conv": width, "C_conv": width}
    yield from rules.packed(f"{theirs}.conv1d", ours, channels, options["conv_bias"], rules.CONV1D)
    yield from same(theirs, ours, {"dt_bias": "decay/dt_bias", "A_log": "decay/A_log", "D": "D"})
    yield norm(f"{theirs}.norm", f"{ours}/o_norm")
    yield from rules.linear(f"{theirs}.out_proj", f"{ours}/o", bias)
