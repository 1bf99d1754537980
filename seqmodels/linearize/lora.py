"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685, section 4.1): W' = W + alpha / r A B.

Adapters transform parameters, so a model does not know of them: it is applied to `merge(params,
adapters, alpha)`, and gradients reach the adapters through that. Any `kernel` of a Dense layer can
have them, also where layers are stacked for a scan. Exporting the merged parameters gives exactly
the model that was trained.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.linearize import partition

# The adapters of "<layer>/kernel" are "<layer>/lora_A" and "<layer>/lora_B".
A, B = "lora_A", "lora_B"


def init(key: Array, boxed_params: dict[str, Any], pattern: str, rank: int) -> dict[str, Any]:
    """Returns the adapters lora_A and lora_B of every Dense kernel whose path `pattern` matches.

    They are a parameter tree of boxed float32 arrays. A (..., in, r) ~ U(-sqrt(3/in), sqrt(3/in))
    and B (..., r, out) = 0, so that at first they change nothing.

    Args:
      boxed_params: the model's parameters as `Module.init` returns them; only their shapes and axis
        names are read. Kernels stacked for a scan have a leading axis "layers".
      pattern: a regular expression. rank: r.

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
        # The axes "in" and "out" are sharded as the kernel's are; the axis r is not.
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
    """Returns parameters whose kernels W are W + alpha / r A B where adapters A, B exist.

    Sums are computed in float32 and rounded to the kernel's dtype; r is the adapters' rank.
    """
    flat, flat_adapters = partition.flatten(params), partition.flatten(adapters)
    for path, down in flat_adapters.items():
        layer, _, name = path.rpartition(partition.SEPARATOR)
        if name == A:
            up = flat_adapters[f"{layer}{partition.SEPARATOR}{B}"]
            product = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
            kernel = f"{layer}{partition.SEPARATOR}kernel"
            delta = alpha / down.shape[-1] * product
            flat[kernel] = (flat[kernel].astype(jnp.float32) + delta).astype(flat[kernel].dtype)
    return partition.unflatten(flat)
