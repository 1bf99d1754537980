"""Copies a teacher's parameters into a student by rule, such as "all but attention".

LiT (arXiv 2501.12976, section on weight inheritance) begins with all of a softmax denoiser's
weights but those of its attention: an attention's q, k, v and o are of no use to a linear mixer.
A rule is one of `RULES`, or a regular expression of paths. Layers are compared one by one, however
either model stacks them, under paths such as "layers/3/mixer/q/kernel".
"""

import dataclasses
from typing import Any

import jax

from seqmodels.linearize import layer_trees, partition

LAYERS = "layers"
_MOST_LISTED = 8


def _but_attention(*projections: str) -> str:
    """Returns a pattern of all paths but those in mixers, of which it has these projections."""
    taken = f"(?!(?:{'|'.join(projections)})/)" if projections else ""
    return f"^(?!.*/mixer/{taken})"


# Names of rules: patterns of what is copied. LiT's ablation adds an attention's projections to all
# other parameters; "all" asks for a student whose mixers have the teacher's parameters.
RULES = {
    "none": "",
    "all_but_attention": _but_attention(),
    "q": _but_attention("q"),
    "k": _but_attention("k"),
    "v": _but_attention("v"),
    "kv": _but_attention("k", "v"),
    "qkv": _but_attention("q", "k", "v"),
    "qkvo": _but_attention("q", "k", "v", "o"),
    "all": ".",
}


@dataclasses.dataclass(frozen=True)
class Inherited:
    """Result of `inherit`.

    params: the student's parameters. taken: paths of those that are the teacher's. new: paths of
      those that the student began with. left: paths of the teacher's that the rule leaves.
    """

    params: dict[str, Any]
    taken: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    def report(self) -> str:
        """Returns a text that says how many parameters are inherited, and lists what is new.

        Layers that are alike share an entry, as "layers/*/mixer/q/kernel".
        """
        total = len(self.taken) + len(self.new)
        text = f"{len(self.taken)} of {total} parameters are inherited"
        return text + (f"; new: {', '.join(_without_numbers(self.new))}" if self.new else "")


def inherit(teacher: tuple, student: tuple, rule: str = "all_but_attention") -> Inherited:
    """Returns the student's parameters, with those that `rule` chooses replaced by the teacher's.

    Values keep the student's dtypes.

    Args:
      teacher, student: (model, parameters) each, of any two models whose layers `layer_trees`
        splits. Parameters are arrays without boxes.
      rule: a name in `RULES`, or a regular expression; of the teacher's parameters, those in whose
        paths it occurs are copied. The paths are those of `paths`.

    Raises:
      ValueError: models of different depths; a rule, other than "none", that chooses nothing;
        chosen parameters that the student lacks, or has with other shapes, which are listed.
    """
    theirs, own = paths(*teacher), paths(*student)
    depths = [len(model.mixers) for model, _ in (teacher, student)]
    if depths[0] != depths[1]:
        raise ValueError(
            f"a student inherits layer by layer: the teacher has {depths[0]}, the student {depths[1]}"
        )
    chosen = partition.matches(RULES.get(rule, rule))
    taken = {path: leaf for path, leaf in theirs.items() if chosen(path)}
    if not taken and rule != "none":
        raise ValueError(
            f"inherit: rule {rule!r} matches no parameter of the teacher; choose one of "
            f"{', '.join(RULES)}, or a regular expression of paths such as {next(iter(theirs))}"
        )
    _check_fit(taken, own, rule)

    # Put the teacher's values in place of the student's, and stack layers as the student does.
    values = own | {path: leaf.astype(own[path].dtype) for path, leaf in taken.items()}
    tree = partition.unflatten(values)
    layers = tree.pop(LAYERS, {})
    params = layer_trees.join(student[0], tree, [layers[str(i)] for i in range(depths[1])])
    return Inherited(
        params,
        tuple(sorted(taken)),
        tuple(sorted(own.keys() - taken.keys())),
        tuple(sorted(theirs.keys() - taken.keys())),
    )


def paths(model, params: dict[str, Any]) -> dict[str, jax.Array]:
    """Returns {path: parameter} of a model, with layers apart.

    Paths are "layers/3/mixer/q/kernel" inside of layers, and as they are outside:
    "embed/embedding".
    """
    shared, layers = layer_trees.split(model, params)
    return partition.flatten(shared | {LAYERS: {str(i): tree for i, tree in enumerate(layers)}})


def _check_fit(taken, own, rule: str) -> None:
    """Raises ValueError, listing them, if the student lacks chosen parameters or their shapes."""
    wrong = [
        f"  {path}: teacher {leaf.shape}, student {own[path].shape if path in own else 'has none'}"
        for path, leaf in sorted(taken.items())
        if path not in own or own[path].shape != leaf.shape
    ]
    if wrong:
        more = [f"  ... and {len(wrong) - _MOST_LISTED} more"] if len(wrong) > _MOST_LISTED else []
        raise ValueError(
            f"inherit: {len(wrong)} of the teacher's parameters that rule {rule!r} chooses do not "
            "fit the student; choose another rule, or options that give the student's mixers these "
            "shapes:\n" + "\n".join(wrong[:_MOST_LISTED] + more)
        )


def _without_numbers(found: tuple[str, ...]) -> list[str]:
    """Returns the paths with layers' indices replaced by "*", each once."""
    shown = {}
    for path in found:
        parts = path.split(partition.SEPARATOR)
        if parts[0] == LAYERS:
            parts[1] = "*"
        shown[partition.SEPARATOR.join(parts)] = None
    return list(shown)
