"""Channel mixers: MLPs and mixtures of experts, which transform each token by itself.

Those whose class sets `uses_tokens` read a token's neighbours on the grid, too, and are called with
the segment ids; language models refuse them.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import fields, operators
from seqmodels.array_typing import Array, DType
from seqmodels.modules import grids, layers, pattern

# name: (activation of the gate or of the hidden layer, whether there is a gate)
_KINDS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "swiglu": (jax.nn.silu, True),  # GLU variants, arXiv 2002.05202
    "geglu": (jax.nn.gelu, True),
    "sglu": (jax.nn.identity, True),  # TransNormerLLM, arXiv 2307.14995, eq. 11: no activation
    "gelu": (jax.nn.gelu, False),
}
_CONVOLUTIONAL = ("conv_gelu", "conv_swiglu")


def names() -> list[str]:
    """Returns the name of every channel mixer."""
    return sorted([*_KINDS, *_CONVOLUTIONAL, "moe"])


def make(
    text: str,
    /,
    *,
    d_ff: int | None = None,
    use_bias: bool = False,
    grid: tuple[int, ...] | None = None,
    **keywords,
) -> nn.Module:
    """Makes the channel mixer that `text` names, with options as in a pattern.

    Examples: "swiglu", "moe(num_experts=8, experts_per_token=2)".

    Args:
      d_ff, use_bias: hidden width and biases, unless `text` gives its own; "moe" has no biases.
      grid: sizes of a document's axes, for channel mixers that have this field.
      **keywords: further fields of the module, such as dtype and name.

    Raises:
      ValueError: an unknown channel mixer or option, with the choices listed, or an option of the
        wrong type.
    """
    specs = pattern.parse(text) if isinstance(text, str) else [pattern.MixerSpec("")]
    name, options = specs[0].name, dict(specs[0].options)
    if len(specs) != 1 or name not in names():
        raise ValueError(f"channel_mixer is {text!r}; choose one of {', '.join(names())}")
    shared: dict[str, Any] = {"d_ff": d_ff}
    if name == "moe":
        module = MixtureOfExperts
    else:
        module = ConvChannelMixer if name in _CONVOLUTIONAL else ChannelMixer
        shared |= {"kind": name, "use_bias": use_bias}
    known = {f.name for f in dataclasses.fields(module)} - {"parent", "name", "kind"}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"channel mixer {name!r} has no option {unknown[0]!r}; "
            f"it has {', '.join(sorted(known))}"
        )
    if "grid" in known:
        shared["grid"] = grid
    kinds = typing.get_type_hints(module)
    for option, value in options.items():
        fields.checked(f"{option} of channel mixer {name}", value, kinds[option])
    return module(**(shared | keywords | options))


class ChannelMixer(nn.Module):
    """An MLP: y = W_down(act(W_gate x) * W_up x) with a gate, y = W_down act(W_up x) without.

    Attributes:
      kind: "swiglu", "geglu", "sglu" (a gate without an activation) or "gelu" (no gate).
      d_ff: the hidden width F; None is 4 D without a gate, and with one 8/3 D, rounded up to a
        multiple of 64, which has as many parameters.
      use_bias: whether the projections have biases.
    """

    kind: str = "swiglu"
    d_ff: int | None = None
    use_bias: bool = False
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        if self.kind not in _KINDS:
            raise ValueError(
                f"unknown channel mixer {self.kind!r}; choose one of {', '.join(names())}"
            )
        activation, gated = _KINDS[self.kind]
        D = x_BTD.shape[-1]
        F = _hidden_width(self.d_ff, D, gated)

        options = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(layers.dense, **options)
        up_BTF = dense(F, "up", axes=("embed", "mlp"))(x_BTD)
        if gated:
            gate_BTF = dense(F, "gate", axes=("embed", "mlp"))(x_BTD)
            hidden_BTF = layers.gated(up_BTF, gate_BTF, activation)
        else:
            hidden_BTF = layers.recomputed(activation)(up_BTF)
        return dense(D, "down", axes=("mlp", "embed"))(hidden_BTF)


class ConvChannelMixer(nn.Module):
    """An MLP with a depthwise convolution of its hidden channels on each document's grid.

        conv_gelu:    h = gelu(W_up x);  y = W_down (h + conv(h))
        conv_swiglu:  h, g = conv(silu(W_up x));  y = W_down (h * silu(g))

    The first is that of RAVLT (arXiv 2411.07635), MALA and NaLaFormer, the second SANA's Mix-FFN
    (arXiv 2410.10629), whose convolution is over 2 F channels.

    Attributes:
      kind: "conv_gelu" or "conv_swiglu".
      d_ff: the hidden width F; None is as for "gelu" and "swiglu".
      use_bias: whether the projections have biases; the convolution has one.
      kernel_size: odd number of its taps along each axis.
      grid: sizes of a document's axes; None is one axis.
    """

    kind: str = "conv_gelu"
    d_ff: int | None = None
    use_bias: bool = False
    kernel_size: int = 3
    grid: tuple[int, ...] | None = None
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    uses_tokens = True

    @nn.compact
    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None = None) -> Array:
        gated, D = self.kind == "conv_swiglu", x_BTD.shape[-1]
        F = _hidden_width(self.d_ff, D, gated)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(layers.dense, use_bias=self.use_bias, **dtypes)
        conv = grids.DepthwiseConv(self.kernel_size, self.grid, name="conv", **dtypes)
        up_BTF = dense(2 * F if gated else F, "up", axes=("embed", "mlp"))(x_BTD)
        activation = jax.nn.silu if gated else jax.nn.gelu
        hidden_BTF = layers.recomputed(activation)(up_BTF)
        near_BTF = conv(hidden_BTF, segment_ids_BT)
        if gated:
            h_BTF, gate_BTF = jnp.split(near_BTF, 2, axis=-1)
            hidden_BTF = layers.gated(h_BTF, gate_BTF, jax.nn.silu)
        else:
            hidden_BTF = hidden_BTF + near_BTF
        return dense(D, "down", axes=("mlp", "embed"))(hidden_BTF)


def _hidden_width(d_ff: int | None, D: int, gated: bool) -> int:
    """Returns F: `d_ff`, or 4 D without a gate and 8/3 D in multiples of 64 with one."""
    return d_ff or (-(-8 * D // (3 * 64)) * 64 if gated else 4 * D)


class MixtureOfExperts(nn.Module):
    """Mixture of experts: each token passes through the `experts_per_token` most likely experts.

        y = sum over the chosen experts e of w_e SwiGLU_e(x) + sigmoid(w_s . x) SwiGLU_s(x)

    (Shazeer et al., arXiv 1701.06538; shared expert s: DeepSeekMoE, arXiv 2401.06066; its gate:
    Qwen1.5-MoE). p = softmax(W_r x) in float32; the experts with the largest p are chosen, and
    their w_e are these p, divided by their sum where `normalize`. Experts have no capacity limit,
    so a token's result does not depend on other tokens. Tokens are sorted by expert, and each
    product is one `jax.lax.ragged_dot`: experts that were not chosen cost nothing where the backend
    has a kernel for it. There is no load-balancing loss: this module is for weights that were
    trained with one.

    Attributes:
      num_experts, experts_per_token: the numbers of experts, X in all and A chosen per token.
      d_ff: hidden width of each expert; None is that of "swiglu".
      normalize: whether the weights of the chosen experts sum to 1.
      shared_d_ff: hidden width of an expert that every token passes through; None leaves it out.
      shared_gate: whether the factor sigmoid(w_s . x) scales the shared expert.
    """

    num_experts: int = 8
    experts_per_token: int = 2
    d_ff: int | None = None
    normalize: bool = True
    shared_d_ff: int | None = None
    shared_gate: bool = True
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        X, A, D = self.num_experts, self.experts_per_token, x_BTD.shape[-1]
        if not 1 <= A <= X:
            raise ValueError(f"moe: experts_per_token {A} must be between 1 and num_experts {X}")
        F = _hidden_width(self.d_ff, D, gated=True)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        router = layers.dense(
            X,
            "router",
            axes=("embed", None),
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
        )
        # Probabilities of the experts, and the A largest of each token.
        p_BTX = jax.nn.softmax(router(x_BTD.astype(jnp.float32)))
        w_BTA, expert_BTA = jax.lax.top_k(p_BTX, A)
        if self.normalize:
            w_BTA /= jnp.sum(w_BTA, axis=-1, keepdims=True)
        # No mesh axis splits these letters but for B and T: each device sorts its own tokens, and
        # has every expert.
        arrays = {
            "x_BTM": (x_BTD.astype(self.dtype), "BTM"),
            "w_BTA": (w_BTA, "BTA"),
            "expert_BTA": (expert_BTA, "BTA"),
            "gate_XMF": (self._kernels("gate", (X, D, F), ("embed", "mlp")), "XMF"),
            "up_XMF": (self._kernels("up", (X, D, F), ("embed", "mlp")), "XMF"),
            "down_XFM": (self._kernels("down", (X, F, D), ("mlp", "embed")), "XFM"),
        }
        y_BTD = operators.on_parts(_chosen_experts, arrays, "BTM")
        if self.shared_d_ff is not None:
            shared_BTD = ChannelMixer("swiglu", self.shared_d_ff, name="shared", **dtypes)(x_BTD)
            if self.shared_gate:
                gate = layers.dense(
                    1, "shared_gate", axes=("embed", None), use_bias=False, **dtypes
                )
                shared_BTD *= jax.nn.sigmoid(gate(x_BTD))
            y_BTD += shared_BTD
        return y_BTD

    def _kernels(self, name: str, shape: tuple[int, int, int], axes: tuple[str, str]) -> Array:
        init = layers.partitioned(nn.initializers.lecun_normal(batch_axis=(0,)), (None, *axes))
        return self.param(f"{name}_kernel", init, shape, self.param_dtype).astype(self.dtype)


def _chosen_experts(axis_name, x_BTM, w_BTA, expert_BTA, gate_XMF, up_XMF, down_XFM):
    del axis_name  # tokens do not meet
    (B, T, D), A, X = x_BTM.shape, w_BTA.shape[-1], gate_XMF.shape[0]
    # Rows R, a token and one of its experts each, are sorted by expert.
    expert_R = expert_BTA.reshape(-1)
    order_R = jnp.argsort(expert_R, stable=True)
    x_RM = x_BTM.reshape(B * T, D)[order_R // A]
    count_X = jnp.bincount(expert_R, length=X).astype(jnp.int32)

    def product(rows, kernels):
        return jax.lax.ragged_dot(
            rows, kernels, count_X, preferred_element_type=jnp.float32
        ).astype(x_BTM.dtype)

    # Each expert multiplies its own run of rows; then the rows go back to their tokens.
    hidden_RF = layers.gated(product(x_RM, up_XMF), product(x_RM, gate_XMF), jax.nn.silu)
    y_RM = product(hidden_RF, down_XFM)[jnp.argsort(order_R)]
    y_BTAM = y_RM.reshape(B, T, A, D).astype(jnp.float32) * w_BTA[..., None]
    return jnp.sum(y_BTAM, axis=2).astype(x_BTM.dtype)
