"""Denoisers: diffusion transformers over any blocks, and sampling from them."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import encoder
from seqmodels.array_typing import Array
from seqmodels.modules import blocks, diffusion, layers, norms, pattern

_TIME_CHANNELS = 256  # of the sinusoidal embedding of time


class Denoiser(encoder.GridModel):
    """A diffusion transformer (DiT, arXiv 2212.09748): what noised patches were made of.

        c = W_2 silu(W_1 sinusoids(time)) + embedding[label]
        h = blocks(W_e x + positions, c); (shift, scale) = W_m silu(c) + b
        out = W_o (norm(h) * (1 + scale) + shift)

    Blocks are `blocks.Block` with the condition c (adaLN-zero); W_m, b and W_o start at 0. DiT has
    norm="layer_norm(use_scale=False, use_bias=False)", channel_mixer="gelu", channel_bias=True and
    position_embedding="sinusoidal". What `out` stands for is the objective's, `diffusion`.

    Args:
      x_BTE: noised patches, `process.noised`.
      time_BT: each token's time in [0, 1], (B, T), or each row's, (B, 1).
      label_BT: the class of each token's document, or each row's; -1 is no class, for which a
        vector is learned too (classifier-free guidance, arXiv 2207.12598). Not read without
        num_classes.

    Returns out_BTE, float32; with learn_variance (out_BTE, share_BTE), by which
    `diffusion.log_variance` gives the variance of a step.

    Attributes: those of `encoder.GridModel`, and
      num_classes: number of classes; 0 makes an unconditional model.
      objective: "velocity" or "noise"; noise_schedule: "linear" or "cosine", of the objective
        "noise".
      learn_variance: whether there is the second output (objective "noise").
    """

    d_model: int
    mixers: tuple[pattern.MixerSpec, ...]
    num_classes: int = 0
    objective: str = "velocity"
    noise_schedule: str = "linear"
    learn_variance: bool = False

    choices = {
        **encoder.GridModel.choices,
        "objective": diffusion.OBJECTIVES,
        "noise_schedule": diffusion.SCHEDULES,
    }
    positive = (*encoder.GridModel.positive, "input_dim")

    def __post_init__(self):
        super().__post_init__()
        if self.learn_variance and self.objective != "noise":
            raise ValueError(
                f"config.model.learn_variance needs objective 'noise'; it is {self.objective!r}"
            )
        if self.norm_position != "pre":
            raise ValueError(
                f"config.model.norm_position is {self.norm_position!r}; a denoiser's layers, whose "
                "norms are modulated, need 'pre'"
            )

    @property
    def process(self) -> diffusion.Process:
        """Returns the noising process and objective that the model is for."""
        return diffusion.Process(self.objective, self.noise_schedule)

    @nn.compact
    def __call__(
        self,
        x_BTE: Array,
        time_BT: Array,
        label_BT: Array | None = None,
        segment_ids_BT: Array | None = None,
        coordinates_BTA: Array | None = None,
    ) -> Array | tuple[Array, Array]:
        condition_BTD = self._condition(time_BT, label_BT)
        x_BTD = self.embed_patches(x_BTE.astype(self.dtype))
        x_BTD = self.hidden(x_BTD, segment_ids_BT, coordinates_BTA, condition_BTD)
        # The last layer is modulated as the blocks are, without a gate.
        shift_BTD, scale_BTD = blocks.modulation(2, condition_BTD, self.dtype, self.param_dtype)
        x_BTD = norms.apply(self.norm, self.norm_eps, "final_norm", x_BTD, segment_ids_BT)
        x_BTD = x_BTD * (1.0 + scale_BTD) + shift_BTD
        E = self.input_dim
        output = layers.dense(
            2 * E if self.learn_variance else E,
            "output",
            axes=("embed", None),
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        out_BTE = output(x_BTD.astype(self.dtype)).astype(jnp.float32)
        return (out_BTE[..., :E], out_BTE[..., E:]) if self.learn_variance else out_BTE

    def _condition(self, time_BT: Array, label_BT: Array | None) -> Array:
        """Returns the condition of all layers, the embedded time plus the class's vector."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(0.02)
        h_BTD = sinusoids(self.process.embedded_time(time_BT)).astype(self.dtype)
        for name in ("time_in", "time_out"):
            axes = ("embed" if name == "time_out" else None, None)
            dense = layers.dense(self.d_model, name, axes=axes, kernel_init=init, **dtypes)
            h_BTD = dense(jax.nn.silu(h_BTD) if name == "time_out" else h_BTD)
        if not self.num_classes:
            return h_BTD
        if label_BT is None:
            raise ValueError("this denoiser has classes: pass label_BT, with -1 for no class")
        shape = (self.num_classes + 1, self.d_model)
        boxed = layers.partitioned(init, (None, "embed"))
        table_WD = self.param("class_embedding", boxed, shape, self.param_dtype)
        index_BT = jnp.where(label_BT < 0, self.num_classes, label_BT)
        return h_BTD + jnp.take(table_WD, index_BT, axis=0).astype(self.dtype)


def sinusoids(time_BT: Array) -> Array:
    """Returns cos(t w_i), then sin(t w_i), w_i = 10000^(-i / 128), of times t: (B, T, 256)."""
    half = _TIME_CHANNELS // 2
    w_11F = jnp.exp(-math.log(10_000.0) / half * jnp.arange(half, dtype=jnp.float32))[None, None]
    angle_BTF = time_BT[..., None] * w_11F
    return jnp.concatenate([jnp.cos(angle_BTF), jnp.sin(angle_BTF)], axis=-1)


def ddim_sample(
    model: Denoiser,
    variables: Any,
    key: Array,
    shape_BTE: Sequence[int],
    label_B: Array | None = None,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    largest: float | None = None,
    segment_ids_BT: Array | None = None,
    coordinates_BTA: Array | None = None,
) -> Array:
    """Returns samples x_BTE of a denoiser by DDIM (`diffusion.ddim`), from noise that `key` draws.

    variables: what `model.apply` takes, {"params": ...}.
    label_B: the class of each row, -1 for none; None is none for all.
    guidance: w of the prediction p(none) + w (p(label) - p(none)) (arXiv 2207.12598, eq. 6, with
      w for its 1 + w); 1 runs the model once per step.
    steps, largest: see `diffusion.ddim`.
    """
    B = shape_BTE[0]
    none_B1 = jnp.full((B, 1), -1, jnp.int32)
    label_B1 = none_B1 if label_B is None else jnp.asarray(label_B, jnp.int32)[:, None]

    def model_of(x_BTE, time, label_B1):
        time_B1 = jnp.full((B, 1), time)
        out: Any = model.apply(variables, x_BTE, time_B1, label_B1, segment_ids_BT, coordinates_BTA)
        return out[0] if model.learn_variance else out

    def predict(x_BTE, time):
        out_BTE = model_of(x_BTE, time, label_B1)
        if guidance == 1.0 or not model.num_classes:
            return out_BTE
        free_BTE = model_of(x_BTE, time, none_B1)
        return free_BTE + guidance * (out_BTE - free_BTE)

    noise_BTE = jax.random.normal(key, tuple(shape_BTE), jnp.float32)
    return diffusion.ddim(model.process, predict, noise_BTE, steps, largest)
