"""Folds norms by batch statistics into the linear layers that read them, exactly (SLAB's RepBN)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from seqmodels.array_typing import Array
from seqmodels.modules import norms, stack

# Dense layers that read a norm's output, and those that do not, by their module and name.
_READERS = {
    "mixer": ("q", "k", "v", "g", "gate", "i", "f"),
    "channel_mixer": ("up", "gate"),
}
_OTHERS = {"mixer": ("o", "output", "local"), "channel_mixer": ("down",)}


def fold(model: stack.Stack, variables: dict[str, Any]) -> tuple[stack.Stack, dict[str, Any]]:
    """Returns a model without norms, and its variables, that computes what `model` does.

    In evaluation BatchNorm, RepBN and PRepBN are y = a x + c, a and c one number per channel:

        a = scale / sqrt(var + eps) + alpha      (alpha 0 of BatchNorm)
        c = bias - mean scale / sqrt(var + eps)

    and W^T (a x + c) + b = (diag(a) W)^T x + (b + W^T c): each linear layer that reads y takes a
    into its matrix and c into its bias. Of a mixer they are its projections q, k, v and of gates,
    of a channel mixer its first matrices, and of an encoder's last norm the output layer, as the
    mean over a document commutes with y. The norm of the model that is returned is "identity".

    variables: {"params": ..., "batch_stats": ...}, as `model.apply` takes them.

    Raises ValueError for a norm without batch statistics, norms that are not before the mixers
    (norm_position "pre"), a layer without a bias that c can go to, and mixers with other layers, of
    which it is not known whether they read the norm.
    """
    if not norms.uses_tokens(model.norm) or model.norm_position != "pre":
        raise ValueError(
            f"norm {model.norm!r} with norm_position {model.norm_position!r} cannot be folded; it "
            f"takes {', '.join(norms.BATCH_NORMS)}, and 'pre'"
        )
    params: Any = traverse_util.flatten_dict(variables["params"])
    stats: Any = traverse_util.flatten_dict(variables[norms.STATISTICS])
    # Each norm's parameters and statistics by the path of the norm.
    affine = {
        path: _affine(_below(params, path), _below(stats, path), model.norm_eps)
        for path in sorted({_norm_path(path) for path in stats})
    }
    folded = {path: leaf for path, leaf in params.items() if _norm_path(path) not in affine}
    for path, (a_D, c_D) in affine.items():
        for reader in _readers(folded, path):
            kernel, bias = folded[(*reader, "kernel")], folded.get((*reader, "bias"))
            if bias is None:
                raise ValueError(
                    f"{'/'.join(reader)} has no bias, which the offset of {'/'.join(path)} goes "
                    "to: give the mixer use_bias=True, and the model channel_bias=True"
                )
            # Layers that are scanned over have a leading axis.
            folded[(*reader, "kernel")] = (a_D[..., None] * kernel).astype(kernel.dtype)
            offset = jnp.einsum("...D,...DF->...F", c_D, kernel)
            folded[(*reader, "bias")] = (bias + offset).astype(bias.dtype)
    return model.clone(norm="identity"), {"params": traverse_util.unflatten_dict(folded)}


def _norm_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the part of a leaf's path that is its norm's; () where it belongs to none."""
    names = ("mixer_norm", "channel_norm", "final_norm")
    return next((path[: i + 1] for i, name in enumerate(path) if name in names), ())


def _below(leaves: dict[tuple, Any], path: tuple[str, ...]) -> dict[str, Any]:
    found = {p[len(path) :]: leaf for p, leaf in leaves.items() if p[: len(path)] == path}
    return traverse_util.unflatten_dict(found)


def _affine(params: dict[str, Any], stats: dict[str, Any], eps: float) -> tuple[Array, Array]:
    """Returns (a, c) of a norm in evaluation; leading axes are those of its layers."""
    params, stats = params.get("rep", params), stats.get("rep", stats)
    own, seen = params.get("norm", params), stats.get("norm", stats)
    factor = own["scale"] * jax.lax.rsqrt(seen["var"] + eps)
    alpha = jnp.asarray(params.get("alpha", 0.0))[..., None]
    return factor + alpha, own["bias"] - seen["mean"] * factor


def _readers(params: dict[tuple, Any], norm: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns the paths of the dense layers that read a norm's output."""
    *block, name = norm
    if name == "final_norm":
        return [(*block, "output")]
    module = {"mixer_norm": "mixer", "channel_norm": "channel_mixer"}[name]
    prefix = (*block, module)
    names = {p[len(prefix)] for p in params if p[: len(prefix)] == prefix and p[-1] == "kernel"}
    known = {*_READERS[module], *_OTHERS[module]}
    if unknown := sorted(names - known):
        raise ValueError(
            f"{'/'.join(prefix)} has the layer {unknown[0]!r}, of which it is not known whether it "
            f"reads {name}: fold takes {module}s of {', '.join(sorted(known))}"
        )
    return [(*prefix, name) for name in sorted(names) if name in _READERS[module]]
