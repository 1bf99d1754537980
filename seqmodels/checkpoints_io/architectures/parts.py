"""What several linear-time families share: rows of their tables, and ways to read a config.json."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import HFConfig, decoder
from seqmodels.modules.pattern import MixerSpec

_MOST_EXPERTS = 4096


def spec(name: str, **options) -> MixerSpec:
    """A layer of a pattern; an option that is None is left out."""
    return MixerSpec(name, tuple((k, v) for k, v in options.items() if v is not None))


def options_of(specs: Sequence[MixerSpec], name: str) -> dict[str, Any]:
    """The options, defaults too, of the first layer whose mixer is `name`. The framework finds out
    where others differ."""
    for layer in specs:
        if layer.name == name:
            return decoder.option_values(layer)
    raise ValueError(f"this layout needs a layer of {name}; the model has none")


def only(specs: Sequence[MixerSpec], *names: str) -> None:
    """Refuses mixers that a layout has no name for."""
    if others := sorted({s.name for s in specs} - set(names)):
        raise ValueError(f"only {' and '.join(names)} have a place in this layout, not {others[0]}")


def given(model: Mapping[str, Any], field: str) -> Any:
    """A field of config.model, or an option of a layer, that a layout has to spell out."""
    if model.get(field) is None:
        raise ValueError(f"this layout needs {field}; set it in config.model or in its pattern")
    return model[field]


def refuse_unless(config: HFConfig, **fields) -> None:
    """`HFConfig.require` for several fields."""
    for field, value in fields.items():
        config.require(field, value)


def listed(config: HFConfig, field: str, kind: type, default: Sequence[Any] = ()) -> list[Any]:
    """A list, of any length, of integers or strings."""
    value = config.get(field, list(default))
    if not isinstance(value, list) or any(type(x) is not kind for x in value):
        raise ValueError(
            f"{config.name}: {field} is {value!r}; it must be a list of {kind.__name__}"
        )
    return value


def expert_count(config: HFConfig, field: str, default: int) -> int:
    """Experts of a layer: each has tensors of its own, so a number beyond reason is refused before
    they are named."""
    count = config.integer(field, default)
    if count > _MOST_EXPERTS:
        raise ValueError(
            f"{config.name}: {field} is {count}; at most {_MOST_EXPERTS} are supported"
        )
    return count


def no_time_step_limit(config: HFConfig) -> None:
    """Refuses Mamba-2's optional bounds on dt."""
    limit = config.get("time_step_limit", [0.0, float("inf")])
    # transformers 5 writes what JSON has no number for as an object.
    if limit not in ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]):
        raise ValueError(
            f"{config.name}: time_step_limit is {limit!r}; only [0, Infinity] is supported"
        )


def ends(model: Mapping[str, Any], embedding: str, norm: str) -> Iterator[rules.Rule]:
    """The embedding, the last norm, and lm_head."""
    yield rules.same(f"{embedding}.weight", "embed/embedding")
    yield rules.same(f"{norm}.weight", "final_norm/scale")
    if not model.get("tied_embeddings", True):
        yield rules.transposed("lm_head.weight", "output/kernel")


def norm(name: str, path: str) -> rules.Rule:
    return rules.same(f"{name}.weight", f"{path}/scale")


def linears(
    theirs: str, ours: str, names: Mapping[str, str], bias: bool = False
) -> Iterator[rules.Rule]:
    """Several nn.Linear of a module, {theirs: ours}."""
    for their_name, our_name in names.items():
        yield from rules.linear(f"{theirs}.{their_name}", f"{ours}/{our_name}", bias)


def gated_mlp(
    theirs: str, ours: str, bias: bool = False, names=("gate_proj", "up_proj", "down_proj")
) -> Iterator[rules.Rule]:
    yield from linears(theirs, ours, dict(zip(names, ("gate", "up", "down"))), bias)


def packed_linear(
    name: str, ours: str, widths: Mapping[str, int], bias: bool = False
) -> Iterator[rules.Rule]:
    """One nn.Linear whose output features are, one after another, those of several of ours, {ours:
    features}."""
    paths = [f"{ours}/{own}" for own in widths]
    sizes = list(widths.values())
    yield rules.split(f"{name}.weight", [f"{p}/kernel" for p in paths], sizes)
    if bias:
        yield rules.split(f"{name}.bias", [f"{p}/bias" for p in paths], sizes, transpose=False)


def packed_conv1d(
    name: str, ours: str, widths: Mapping[str, int], bias: bool = False
) -> Iterator[rules.Rule]:
    """One depthwise nn.Conv1d, weight (channels, 1, taps), over the channels of several of ours."""
    paths = [f"{ours}/{own}" for own in widths]
    sizes = list(widths.values())
    cut = rules.split(f"{name}.weight", [f"{p}/kernel" for p in paths], sizes, transpose=False)

    def into(x):
        return [part.squeeze(1).T for part in cut.into(x)]

    def out(*parts):
        return cut.out(*(part.T[:, None] for part in parts))

    yield rules.Rule(cut.names, cut.paths, into, out)
    if bias:
        yield rules.split(f"{name}.bias", [f"{p}/bias" for p in paths], sizes, transpose=False)


def packed_heads(
    name: str, ours: str, heads: int, widths: Mapping[str, int], bias: bool = False
) -> Iterator[rules.Rule]:
    """One nn.Linear whose output features are, head after head, those of several of ours, {ours:
    features of a head}."""
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
    """A SwiGLU an expert, `{theirs}.{e}.{name}.weight` for e < count, as kernels stacked over
    experts.

    names: of the gate, the product beside it, and the product down.
    """
    for their_name, our_name in zip(names, ("gate", "up", "down")):
        yield rules.Rule(
            tuple(f"{theirs}.{e}.{their_name}.weight" for e in range(count)),
            (f"{ours}/{our_name}_kernel",),
            lambda *parts: (np.stack([part.T for part in parts]),),
            lambda x: tuple(part.T for part in x),
        )


def mamba2(layer: MixerSpec, d_model: int, theirs: str, ours: str) -> Iterator[rules.Rule]:
    """The tensors of a Mamba-2 mixer, the same wherever transformers has one."""
    options = decoder.option_values(layer)
    E, V = options["expand"] * d_model, options["head_dim"]
    width = options["num_groups"] * options["d_state"]
    bias = options["use_bias"]
    features = {"z": E, "x": E, "B": width, "C": width, "dt": E // V}
    yield from packed_linear(f"{theirs}.in_proj", ours, features, bias)
    channels = {"x_conv": E, "B_conv": width, "C_conv": width}
    yield from packed_conv1d(f"{theirs}.conv1d", ours, channels, options["conv_bias"])
    yield rules.same(f"{theirs}.dt_bias", f"{ours}/decay/dt_bias")
    yield rules.same(f"{theirs}.A_log", f"{ours}/decay/A_log")
    yield rules.same(f"{theirs}.D", f"{ours}/D")
    yield norm(f"{theirs}.norm", f"{ours}/o_norm")
    yield from rules.linear(f"{theirs}.out_proj", f"{ours}/o", bias)


def check_mamba2_width(config: HFConfig, d_model: int, expand: int, heads: int, dim: int) -> None:
    if expand * d_model != heads * dim:
        raise ValueError(
            f"{config.name}: {heads} heads of {dim} are not expand * hidden_size = {expand * d_model}"
        )
