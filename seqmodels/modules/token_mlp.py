"""MLPs along time: one weight per pair of a position in the document and a hidden unit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqmodels import operators
from seqmodels.array_typing import Array, DType
from seqmodels.modules import layers


class Affine(nn.Module):
    """Makes the weights of an affine map without applying it: a call returns kernel and bias.

    Attributes:
      shape: (inputs, outputs) of the kernel, with the number of experts or heads before them if
        there are several maps.
      axes: logical names of the kernel's last two axes.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, str | None]
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        several = (None,) * (len(self.shape) - 2)
        init = nn.initializers.lecun_normal(batch_axis=tuple(range(len(several))))
        boxed = layers.kernel if not several else layers.partitioned
        kernel = self.param(
            "kernel", boxed(init, (*several, *self.axes)), self.shape, self.param_dtype
        )
        bias_init = layers.undecayed(nn.initializers.zeros, (*several, self.axes[-1]))
        shape = (*self.shape[:-2], self.shape[-1])
        return kernel, self.param("bias", bias_init, shape, self.param_dtype)


class TokenMLP(nn.Module):
    """Makes the weights of an MLP over M positions, y = b' + V gelu(b + W x) for each channel.

    A call returns {"up": (kernel, bias), "down": (kernel, bias)} in `dtype`, the argument of
    `mixed`; kernels are (M, F) and (F, M), with the number of experts X before them if it is given.

    Attributes:
      positions: M.
      hidden: F, the number of hidden units.
      experts: X; None is one MLP.
      causal: whether position t sees no later one. M must divide F; hidden unit f belongs to
        position f // (F / M), sees that and earlier ones and is seen from there on.
    """

    positions: int
    hidden: int
    experts: int | None = None
    causal: bool = False
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self) -> dict[str, tuple[Array, Array]]:
        M, F = self.positions, self.hidden
        several = () if self.experts is None else (self.experts,)
        shapes = {"up": (M, F), "down": (F, M)}
        axes = {"up": (None, "mlp"), "down": ("mlp", None)}
        weights = {
            name: Affine((*several, *shapes[name]), axes[name], self.param_dtype, name=name)()
            for name in shapes
        }
        weights = jax.tree.map(lambda w: w.astype(self.dtype), weights)
        if self.causal:
            (up, up_bias), (down, down_bias) = weights["up"], weights["down"]
            # Which hidden units see which positions, and which positions see which hidden units.
            position_M, position_F = np.arange(M), np.arange(F) // (F // M)
            ones = (1,) * len(several)
            up_mask = (position_M[:, None] <= position_F).reshape(*ones, M, F)
            down_mask = (position_F[:, None] <= position_M).reshape(*ones, F, M)
            up, down = up * up_mask.astype(self.dtype), down * down_mask.astype(self.dtype)
            weights = {"up": (up, up_bias), "down": (down, down_bias)}
        return weights


def mixed(weights: dict[str, tuple[Array, Array]], x_BMD: Array) -> Array:
    """Applies the MLP of `TokenMLP`'s weights, of one expert, to each channel of x_BMD."""
    (up_MF, up_F), (down_FM, down_M) = weights["up"], weights["down"]
    hidden_BFD = jnp.einsum("BMD,MF->BFD", x_BMD, up_MF) + up_F[None, :, None]
    hidden_BFD = layers.recomputed(jax.nn.gelu)(hidden_BFD)
    return jnp.einsum("BFD,FM->BMD", hidden_BFD, down_FM) + down_M[None, :, None]


def chosen(weights: dict[str, tuple[Array, Array]], x_BRM: Array, expert_BR: Array) -> Array:
    """Applies to each row of x_BRM, a channel over M positions, the MLP of its own expert."""
    (up_XMF, up_XF), (down_XFM, down_XM) = weights["up"], weights["down"]
    # No mesh axis splits these letters but B: each device sorts the rows of its own documents.
    arrays = {
        "x_BRM": (x_BRM, "BRM"),
        "expert_BR": (expert_BR, "BR"),
        "up_XMF": (up_XMF, "XMF"),
        "up_XF": (up_XF, "XF"),
        "down_XFM": (down_XFM, "XFM"),
        "down_XM": (down_XM, "XM"),
    }
    return operators.on_parts(_chosen, arrays, "BRM")


def _chosen(axis_name, x_BRM, expert_BR, up_XMF, up_XF, down_XFM, down_XM):
    del axis_name  # rows do not meet
    # Rows of all documents are sorted by expert, and each expert multiplies its own run of them.
    expert_R = expert_BR.reshape(-1)
    order_R = jnp.argsort(expert_R, stable=True)
    count_X = jnp.bincount(expert_R, length=up_XMF.shape[0]).astype(jnp.int32)
    x_RM, expert_R = x_BRM.reshape(-1, x_BRM.shape[-1])[order_R], expert_R[order_R]

    def product(rows, kernels, bias_XF):
        product = jax.lax.ragged_dot(rows, kernels, count_X, preferred_element_type=jnp.float32)
        return product.astype(rows.dtype) + bias_XF[expert_R]

    hidden_RF = layers.recomputed(jax.nn.gelu)(product(x_RM, up_XMF, up_XF))
    y_RM = product(hidden_RF, down_XFM, down_XM)
    return y_RM[jnp.argsort(order_R)].reshape(x_BRM.shape)
