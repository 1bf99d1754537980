"""Makes a linear-time student of a softmax teacher: its layers' mixers and initial parameters."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import language_model, mixers
from seqmodels.linearize import batches, inherit, layer_trees, partition
from seqmodels.mixers import attention
from seqmodels.modules import blocks, pattern, stack

# Mixers of layers that can be converted: softmax attention, causal or over whole documents.
CAUSAL, WHOLE = "attention", "full_attention"
SEEDS = ("auto", "none")


def choose_layers(
    specs: Sequence[pattern.MixerSpec], layers: str = "all", keep_every: int = 0, keep: str = "last"
) -> tuple[int, ...]:
    """Returns the indices of the softmax layers of a teacher that become linear in its student.

    Args:
      specs: the teacher's mixer in each layer.
      layers: "all" for all softmax layers, or indices and ranges such as "0-7,12".
      keep_every: of so many of these layers in a row, one stays softmax; 0 keeps none.
      keep: which one stays, the "last" (Liger-H keeps one after seven, arXiv 2503.01496) or the
        "first" (mmMamba, arXiv 2502.13145).

    Raises:
      ValueError: layers that do not exist or are no softmax layers; an unknown `keep`; no layer
        left to convert.
    """
    softmax = [i for i, spec in enumerate(specs) if spec.name in (CAUSAL, WHOLE)]
    named = softmax if layers == "all" else _indices(layers, len(specs))
    if wrong := [i for i in named if i not in softmax]:
        raise ValueError(
            f"layers {wrong} are not softmax attention but {', '.join(sorted({specs[i].name for i in wrong}))}; the teacher's "
            f"softmax layers are {softmax}"
        )
    if keep not in ("first", "last") or keep_every < 0:
        raise ValueError(
            f"keep is {keep!r} and keep_every {keep_every}; expected 'first' or 'last', and 0 or more"
        )
    if keep_every:
        kept = 0 if keep == "first" else keep_every - 1
        named = [layer for place, layer in enumerate(named) if place % keep_every != kept]
    if not named:
        raise ValueError(
            f"no layer to convert: layers={layers!r}, keep_every={keep_every} of {len(softmax)} softmax layers"
        )
    return tuple(named)


def _indices(text: str, count: int) -> list[int]:
    """Returns the sorted indices in a text such as "0-7,12", which must be below `count`."""
    found, outside = set(), []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(
                f"layers {text!r} cannot be read at {part!r}; write 'all', or indices and rising ranges like '0-7,12'"
            )
        found |= set(range(first, min(last + 1, count)))
        outside += range(max(first, count), last + 1)[:10]
    if outside:
        raise ValueError(
            f"layers {outside} are not there: the teacher has {count}, 0 to {count - 1}"
        )
    return sorted(found)


def student_specs(
    teacher: stack.Stack, student: str, layers: Sequence[int]
) -> tuple[pattern.MixerSpec, ...]:
    """Returns the student's mixers: the teacher's, with those of `layers` replaced.

    student: a pattern of mixers, such as "3*liger + lolcats", which is repeated over `layers`.
    Options that it does not give are `inherited` from the teacher's layer.

    Raises:
      ValueError: a pattern that cannot be read, an unknown mixer, or one that cannot replace a
        teacher's layer.
    """
    try:
        choices = pattern.parse(student)
    except ValueError as error:
        raise ValueError(f"student pattern: {error}") from error
    specs = list(teacher.mixers)
    for place, layer in enumerate(layers):
        choice = choices[place % len(choices)]
        options = inherited(specs[layer], choice.name, teacher.d_model) | dict(choice.options)
        specs[layer] = pattern.MixerSpec(choice.name, tuple(sorted(options.items())))
    return tuple(specs)


def inherited(teacher: pattern.MixerSpec, name: str, d_model: int) -> dict[str, Any]:
    """Returns the options that a mixer called `name` takes over from a teacher's layer.

    The mixer replaces that layer's in the student.

    The same mixer takes all. Subclasses of `mixers.attention.Attention` take those whose default
    they share, except the window. Other causal mixers with heads take the number of heads and the
    head dimension; those that see whole documents keep their papers' own. All take the layer's own
    options, `blocks.LAYER_OPTIONS`.

    Raises ValueError for a mixer that cannot replace this layer.
    """
    theirs = mixers.options(teacher.name) | dict(teacher.options)
    known = mixers.options(name)
    if name == teacher.name:
        return dict(teacher.options)
    if name == "selective" and theirs.get("window") is not None:
        raise ValueError(
            f"selective's softmax part is full, and the teacher's layer has window={theirs['window']}: take lolcats or liger, or name "
            "layers without a window"
        )
    own = {key: value for key, value in teacher.options if key in blocks.LAYER_OPTIONS}
    if not mixers.mixer_class(name).causal:
        return own
    if issubclass(mixers.mixer_class(name), attention.Attention):
        default = mixers.options(CAUSAL)
        same = {key for key in default if known[key] == default[key]} - {"window"}
        return own | {key: value for key, value in teacher.options if key in same}
    H = theirs["num_heads"]
    K = theirs["head_dim"] or d_model // H
    if name == "mamba2":
        if H * K % d_model:
            raise ValueError(
                f"mamba2 in the place of {H} heads of {K} needs a width that d_model {d_model} divides; take mmmamba"
            )
        return own | {"expand": H * K // d_model, "head_dim": K, "d_state": K, "num_groups": H}
    offered = {"num_heads": H, "head_dim": K} if known.get("num_heads") else {}
    return own | {key: value for key, value in offered.items() if key in known}


def student_config(
    model_config: Mapping[str, Any], specs: Sequence[pattern.MixerSpec]
) -> dict[str, Any]:
    """Returns the teacher's config section `model`, with the mixers `specs` as its pattern."""
    return dict(model_config) | {"pattern": pattern.to_text(specs), "num_layers": len(specs)}


def inherited_params(
    key, source: stack.Stack, params: dict[str, Any], student: stack.Stack, rule: str
) -> inherit.Inherited:
    """Returns a student that is initialised, and then inherits from a source by a rule."""
    fresh = jax.jit(lambda key: nn.unbox(batches.init(student, key)))(key)
    return inherit.inherit((source, params), (student, fresh), rule)


def seed_params(
    key,
    source: stack.Stack,
    params: dict[str, Any],
    student: stack.Stack,
    seed: str = "auto",
) -> dict[str, Any]:
    """Returns the parameters with which a student starts.

    Parameters outside of mixers, and mixers that are the same in both models, are the source's. New
    mixers are initialised and, with seed "auto", copy what fits from the mixers they replace:

    - subclasses of softmax attention copy each parameter of the same name and shape;
    - mamba2 copies x, B, C, o from v, k, q, o, with heads repeated (Mamba-in-the-Llama, arXiv
      2408.15237);
    - others copy nothing (gated delta nets: InfiniteVL, arXiv 2512.08829).

    source, params: the teacher, or an earlier student, and its parameters. seed: "auto" or "none",
      which copies nothing.
    """
    if seed not in SEEDS:
        raise ValueError(f"unknown seed {seed!r}; choose one of {', '.join(SEEDS)}")
    shared, layers = layer_trees.split(source, params)
    pairs = enumerate(zip(source.mixers, student.mixers, strict=True))
    changed = [i for i, (old, new) in pairs if old != new]

    @jax.jit
    def fresh(key):
        """Initialises the student's parameters that the source lacks; XLA removes the others."""
        initial = nn.unbox(batches.init(student, key))
        others, own = layer_trees.split(student, initial)
        others = {name: others[name] for name in others.keys() - shared.keys()}
        return others, {i: own[i]["mixer"] for i in changed}

    # Let new mixers take over what fits, and put all layers into the student's stacking.
    others, mixers_of = fresh(key)
    _, shapes = layer_trees.split(
        student, jax.eval_shape(lambda key: nn.unbox(batches.init(student, key)), key)
    )
    for i, mixer in mixers_of.items():
        if seed == "auto":
            mixer = _taken_over(student.mixers[i], layers[i]["mixer"], mixer)
        layer = layers[i] | {"mixer": mixer}
        # A layer without a channel mixer has no use for the source's.
        layers[i] = {name: tree for name, tree in layer.items() if name in shapes[i]}
    return layer_trees.join(student, shared | others, layers)


def _taken_over(new, source, mixer):
    """Returns a new mixer's parameters, replaced by those of the source's mixer where they fit.

    new: the new mixer's MixerSpec. source, mixer: parameters of the source's and the new mixer.
    """
    if issubclass(mixers.mixer_class(new.name), attention.Attention):
        theirs, own = partition.flatten(source), partition.flatten(mixer)
        fitting = {p: x for p, x in theirs.items() if p in own and own[p].shape == x.shape}
        return partition.merge(mixer, partition.unflatten(fitting))
    if new.name == "mamba2":
        K, G = dict(new.options)["head_dim"], dict(new.options)["num_groups"]
        seeds = {"x": "v", "B": "k", "C": "q", "o": "o"}
        copied = {name: {"kernel": source[old]["kernel"]} for name, old in seeds.items()}
        # Keys and values of G heads become those of H: each head of a group gets a copy.
        for name in ("x", "B"):
            W = copied[name]["kernel"]
            W_DGK = W.reshape(W.shape[0], -1, K)
            W_DHK = jnp.repeat(W_DGK, G // W_DGK.shape[1], axis=1)
            copied[name] = {"kernel": W_DHK.reshape(W.shape[0], -1)}
        return partition.merge(mixer, copied)
    return mixer


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Result of `chosen`: a model whose selective layers have chosen softmax or linear attention.

    specs: the mixer of each layer. mix: r, the share of softmax attention, of each selective layer
      by index. layers: parameters of each layer. shared: parameters outside of layers.
    """

    specs: tuple[pattern.MixerSpec, ...]
    mix: dict[int, float]
    layers: list[dict[str, Any]]
    shared: dict[str, Any]


def chosen(model: language_model.LanguageModel, params: dict[str, Any]) -> Chosen:
    """Returns a model's mixers and parameters with each selective layer replaced by its choice.

    The choice is softmax attention where its share r >= 1/2, else LoLCATs without a window.
    """
    shared, layers = layer_trees.split(model, params)
    mix = {
        i: float(jax.nn.sigmoid(layers[i]["mixer"]["mix_logit"][0]))
        for i, spec in enumerate(model.mixers)
        if spec.name == "selective"
    }
    specs = list(model.mixers)
    for i, r in mix.items():
        name = CAUSAL if r >= 0.5 else "lolcats"
        known = mixers.options(name).keys() | set(blocks.LAYER_OPTIONS)
        options = {k: v for k, v in specs[i].options if k in known} | {"window": None}
        specs[i] = pattern.MixerSpec(name, tuple(sorted(options.items())))
        # Softmax attention has no feature maps, and neither has r.
        left_out = r"^mix_logit$" + ("" if name == "lolcats" else "|^[qk]_map/")
        _, mixer = partition.split(layers[i]["mixer"], partition.matches(left_out))
        layers[i] = layers[i] | {"mixer": mixer}
    return Chosen(tuple(specs), mix, layers, shared)
