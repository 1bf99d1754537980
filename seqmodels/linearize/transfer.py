"""Trains a student layer by layer in one pass: each of its layers reads its teacher layer's input.

The layers of a model that `make_model` makes are pairs of a teacher's and a student's layer. The
teacher's layer computes the next hidden states; the student's reads the same input, and the
distance of the two outputs is sown as an intermediate. Only hidden states pass between layers, so
layers are scanned over and recomputed like any model's.

A student may replace more of a layer than its mixer, and then a distance of that part trains it:

    mixer     the mixer's output                                mixer()
    residual  the hidden states after the mixer is added        mixer(mixer_residual=(0.0, 1.0))
    block     the layer's output                                mixer(mixer_residual=(0.0, 1.0),
                                                                      channel_mixer=None)

(shallow networks in place of attention, arXiv 2311.10642, where they are ALR, ALRR and ELR). In all
three the student's mixer still reads the layer's normed input. With norm_position "post", the
paper's, "residual" includes the norm. The last two are not for denoisers: there the condition's
gate multiplies the mixer's output, and with it what stands for the residual connection.
"""

import dataclasses
import functools
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import language_model, mixers
from seqmodels.array_typing import Array
from seqmodels.linearize import batches, layer_trees, partition
from seqmodels.modules import blocks, pattern, stack

TEACHER, STUDENT = "teacher", "student"
# Mean squares over channels of the difference of student and teacher: of the output projection's
# input ("heads"), the mixer's output ("mixer"), the hidden states after it is added ("residual")
# and the layer's output ("block"). Also sown are "relative", which is "mixer" over the teacher's
# mean square, and by feature maps "attention_map" and "attention_map_kl".
DISTANCES = ("heads", "mixer", "residual", "block")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Fields of a layer that pairs a teacher's mixer with the student's mixer in the same place.

    It stands in a pattern in place of a MixerSpec, with the teacher's name and options.
    """

    teacher: pattern.MixerSpec
    student: pattern.MixerSpec

    @property
    def converted(self) -> bool:
        return self.student != self.teacher

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def options(self):
        return self.teacher.options


class PairBlock(blocks.Block):
    """Runs a teacher's and a student's layer on one input, and returns the teacher's output.

    `spec` is a `Pair`; where its two mixers are the same, only the teacher's layer runs. Else the
    student's distances from the teacher (`DISTANCES`) are sown as "intermediates", (B, T) each.
    """

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT, state, fresh_B, layer):
        pair: Any = self.spec

        def run(spec, name, x_BTD):
            block = blocks.Block(spec, **blocks.options_of(self), name=name)
            return _watched(block, x_BTD, segment_ids_BT, layer)

        out_BTD, theirs = run(pair.teacher, TEACHER, x_BTD)
        if pair.converted:
            y_BTD, own = run(pair.student, STUDENT, jax.lax.stop_gradient(x_BTD))
            pairs = {name: (own.get(name), theirs[name]) for name in ("heads", "mixer", "residual")}
            pairs["block"] = y_BTD, out_BTD
            # Heads that are wider than the teacher's, or that a student lacks, are not compared.
            for name, (a, b) in pairs.items():
                if a is not None and a.shape == b.shape:
                    self.sow("intermediates", name, _mean_square(a - b))
            power_BT = _mean_square(theirs["mixer"])
            error_BT = _mean_square(own["mixer"] - theirs["mixer"])
            self.sow("intermediates", "relative", error_BT / (power_BT + 1e-12))
        return out_BTD, None


@functools.cache
def _transfer_class(kind: type[stack.Stack]) -> type[stack.Stack]:
    """Returns the class of models as `kind` whose layers are `Pair`s, in their field `mixers`."""
    return type(f"Transfer{kind.__name__}", (kind,), {"block": PairBlock})


def make_model(teacher: stack.Stack, student: stack.Stack) -> stack.Stack:
    """Returns the model that pairs each teacher layer with the student's in its place.

    It is of a subclass of the student's class: `params` makes its parameters, and `losses` runs it.
    Layers that are not converted, and parameters outside of layers, are the teacher's alone; `kept`
    returns the student's own, which an earlier stage may have trained.

    Raises ValueError for models of different depths.
    """
    if len(teacher.mixers) != len(student.mixers):
        raise ValueError(
            f"teacher and student must have as many layers; got {len(teacher.mixers)} and {len(student.mixers)}"
        )
    fields: dict[str, Any] = {
        f.name: getattr(student, f.name)
        for f in dataclasses.fields(student)
        if f.name not in ("parent", "name")
    }
    fields["mixers"] = tuple(map(Pair, teacher.mixers, student.mixers))
    return _transfer_class(type(student))(**fields)


def params(model: stack.Stack, teacher: tuple, student: tuple) -> dict[str, Any]:
    """Returns the parameters of a model of Pairs, made of the teacher's and the student's.

    teacher, student: (model, parameters) each, whose leaves may be boxed or abstract.
    """
    shared, theirs = layer_trees.split(*teacher)
    _, own = layer_trees.split(*student)
    layers = [
        {TEACHER: a, STUDENT: b} if pair.converted else {TEACHER: a}
        for pair, a, b in zip(_pairs(model), theirs, own)
    ]
    return layer_trees.join(model, shared, layers)


def kept(model: stack.Stack, student: tuple) -> dict[str, Any]:
    """Returns the student's parameters that a model of Pairs does not hold.

    They are those outside of layers, "shared", and those of layers that are not converted, "layers"
    by index. student: (model, parameters), whose leaves may be boxed or abstract.
    """
    shared, own = layer_trees.split(*student)
    pairs = enumerate(zip(_pairs(model), own))
    return {
        "shared": shared,
        "layers": {str(i): layer for i, (pair, layer) in pairs if not pair.converted},
    }


def student_params(
    model: stack.Stack, student, params: dict[str, Any], kept: dict[str, Any]
) -> dict[str, Any]:
    """Returns all parameters of the model `student`, after `model`, of Pairs, was trained.

    params: that model's parameters, of which converted layers are taken. kept: the student's
      other parameters, as the function `kept` returns them.
    """
    _, layers = layer_trees.split(model, params)
    own = [
        layer[STUDENT] if pair.converted else kept["layers"][str(i)]
        for i, (pair, layer) in enumerate(zip(_pairs(model), layers))
    ]
    return layer_trees.join(student, kept["shared"], own)


def losses(model: stack.Stack, params: dict[str, Any], batch: dict[str, Array]) -> dict[str, Array]:
    """Runs a model of Pairs; returns {name: distance of student and teacher layers, (B, T)}.

    Each is a mean over the converted layers. Names are those of DISTANCES, "relative", and those
    that mixers sow themselves, such as "attention_map".

    batch: arrays of the model's inputs, as `batches.arguments` reads them.
    """
    keywords: dict[str, Any] = {"mutable": ["intermediates"]}
    if isinstance(model, language_model.LanguageModel):  # whose logits would take memory
        keywords["head"] = lambda x_BTD, matrix, layout: ()
    sown: Any
    _, sown = model.apply({"params": params}, *batches.arguments(model, batch), **keywords)
    shape_BT = batch["segment_ids"].shape
    found = {}
    for path, leaf in partition.flatten(sown.get("intermediates", {})).items():
        name = path.rpartition(partition.SEPARATOR)[2]
        for x_NBT in leaf:
            found.setdefault(name, []).append(x_NBT.reshape(-1, *shape_BT))
    return {name: jnp.mean(jnp.concatenate(xs), axis=0) for name, xs in found.items()}


def _pairs(model: stack.Stack) -> tuple[Pair, ...]:
    """Returns the field `mixers` of a model of Pairs, with that type."""
    return typing.cast(tuple[Pair, ...], model.mixers)


def _mean_square(x: Array) -> Array:
    """Returns the mean of x^2 over all axes after (B, T), in float32."""
    x = x.astype(jnp.float32)
    return jnp.mean(jnp.square(x), axis=tuple(range(2, x.ndim)))


def _watched(block, x_BTD, segment_ids_BT, layer):
    """Runs a block; returns its output, and inside values of its mixer by name.

    They are "heads", the input of the mixer's output projection, where it has one, "mixer", the
    mixer's output, and "residual", the hidden states after that is added.
    """
    seen = {}

    def watch(call, arguments, keywords, context):
        result = call(*arguments, **keywords)
        if isinstance(context.module, mixers.Mixer):
            if context.method_name == "merge_heads":
                o = arguments[0]
                seen["heads"] = o.reshape(*o.shape[:2], -1)
            elif context.method_name == "__call__":
                seen["mixer"] = result[0]
        if context.method_name == "_residual" and arguments[0] == "mixer":
            seen["residual"] = result[0]
        return result

    with nn.intercept_methods(watch):
        y_BTD, _ = block(x_BTD, segment_ids_BT, None, None, layer)
    return y_BTD, seen
