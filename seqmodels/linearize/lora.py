"""Low-rank adapters as a transform of parameters: W + alpha / r A B (LoRA, Hu et al., arXiv
2106.09685, section 4.1).

A model never sees them: it is applied to `merge(params, adapters, alpha)`, and gradients go to the
adapters through that. So any `kernel` of a Dense layer can have them, stacked over scanned layers
or not, and a merged model is the adapted model bit for bit.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.array_typing import Array
from seqmodels.linearize import partition

# A kernel's adapters lie at its path with these in the place of "kernel".
A, B = "lora_A", "lora_B"


def init(key: Array, boxed_params: dict[str, Any], pattern: str, rank: int) -> dict[str, Any]:
    """Boxed adapters of every `kernel` of two axes whose path `pattern` matches, as Dense layers'
    are: A (..., in, r) ~ U(-sqrt(3/in), sqrt(3/in)), B (..., r, out) zeros, float32, so that at
    first they add nothing.

    boxed_params: as `Module.init` gives them; only shapes and names are read. Leading axes are the
      scan's.

    Raises:
      ValueError: a rank below 1, or a pattern that matches no kernel of a Dense layer.
    """
    if rank < 1:
        raise ValueError(f"lora_rank is {rank}; it must be at least 1")
    chosen = partition.matches(pattern)
    adapters = {}
    for path, leaf in partition.flatten(boxed_params).items():
        layer, _, name = path.rpartition(partition.SEPARATOR)
        if name != "kernel" or not chosen(path):
            continue
        names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        shape = nn.meta.unbox(leaf).shape
        if len(shape) - names.count("layers") != 2:
            continue
        *stack, fan_in, fan_out = shape
        key, own = jax.random.split(key)
        bound = (3.0 / fan_in) ** 0.5
        values = {
            A: jax.random.uniform(own, (*stack, fan_in, rank), jnp.float32, -bound, bound),
            B: jnp.zeros((*stack, rank, fan_out), jnp.float32),
        }
        axes = {A: (*names[:-1], None), B: (*names[:-2], None, names[-1])}
        for which, value in values.items():
            box = nn.LogicallyPartitioned(value, axes[which])
            adapters[f"{layer}{partition.SEPARATOR}{which}"] = box
    if not adapters:
        kernels = [p for p in partition.flatten(boxed_params) if p.endswith("/kernel")]
        raise ValueError(
            f"lora: pattern {pattern!r} matches no kernel of a Dense layer; there are {', '.join(kernels[:12])}"
        )
    return partition.unflatten(adapters)


def merge(params: dict[str, Any], adapters: dict[str, Any], alpha: float) -> dict[str, Any]:
    """The parameters with every adapter added to its kernel, in float32, kept in the kernel's
    dtype."""
    flat = partition.flatten(params)
    for path, delta in deltas(adapters, alpha).items():
        W = flat[path]
        flat[path] = (W.astype(jnp.float32) + delta).astype(W.dtype)
    return partition.unflatten(flat)


def deltas(adapters: dict[str, Any], alpha: float) -> dict[str, Array]:
    """alpha / r A B by the path of its kernel."""
    flat = partition.flatten(adapters)
    found = {}
    for path, down in flat.items():
        layer, _, name = path.rpartition(partition.SEPARATOR)
        if name == A:
            up = flat[f"{layer}{partition.SEPARATOR}{B}"]
            product = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
            found[f"{layer}{partition.SEPARATOR}kernel"] = alpha / down.shape[-1] * product
    return found


def remainders(params: dict[str, Any], adapters: dict[str, Any], alpha: float) -> dict[str, Any]:
    """What rounding loses in `merge`, by the path of its kernel: kernel + delta - merged, float64
    on the host. With it `unmerge` is exact."""
    flat, merged = (partition.flatten(tree) for tree in (params, merge(params, adapters, alpha)))
    return {
        path: _wide(flat[path]) + _wide(delta) - _wide(merged[path])
        for path, delta in deltas(adapters, alpha).items()
    }


def unmerge(
    merged: dict[str, Any], adapters: dict[str, Any], alpha: float, lost: dict[str, Any]
) -> dict[str, Any]:
    """The parameters that `merge` was given, bit for bit. lost: `remainders` of them."""
    flat = partition.flatten(merged)
    for path, delta in deltas(adapters, alpha).items():
        W = flat[path]
        flat[path] = jnp.asarray((_wide(W) - _wide(delta) + lost[path]).astype(W.dtype))
    return partition.unflatten(flat)


def _wide(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)
