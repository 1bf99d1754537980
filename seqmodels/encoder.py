"""Encoders: patches or tokens, a stack of blocks that see whole documents, and classes."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from seqmodels import mixers, operators, sharding
from seqmodels.array_typing import Array
from seqmodels.modules import grids, layers, md_tpe, norms, pattern, stack

POSITIONS = ("none", *md_tpe.KINDS)


class GridModel(stack.Stack):
    """Base class of models of tokens on grids: a stack whose inputs may be patches.

    Attributes: those of `stack.Stack`, and
      grid: sizes of the axes that a document's tokens lie on, the last the fastest: (height, width)
        or (frames, height, width); None is one axis of any length. A row without segment ids has as
        many tokens.
      input_dim: E, the number of channels of a token's input.
      position_embedding: what is added to the embedded tokens: "none", "md_tpe", or a
        kind of `grids.PositionEmbedding`.
      position_conv: see `blocks.Block`.
    """

    _: dataclasses.KW_ONLY
    grid: tuple[int, ...] | None = None
    input_dim: int = 0
    position_embedding: str = "none"
    position_conv: int | None = None

    choices = {**stack.Stack.choices, "position_embedding": POSITIONS}
    positive = (*stack.Stack.positive, "position_conv")

    def embed_patches(self, x_BTE: Array) -> Array:
        """Returns the hidden states of patches x_BTE, W x + b; W starts as other dense layers.

        Raises ValueError for patches of another width than `input_dim`.
        """
        if x_BTE.ndim != 3 or x_BTE.shape[-1] != self.input_dim:
            raise ValueError(
                f"inputs have the shape {x_BTE.shape}; expected (rows, tokens, {self.input_dim}), "
                "with input_dim channels per token"
            )
        dense = layers.dense(
            self.d_model,
            "embed",
            axes=(None, "embed"),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        return dense(x_BTE)

    def hidden(
        self,
        x_BTD: Array,
        segment_ids_BT: Array | None,
        coordinates_BTA: Array | None,
        condition_BTD: Array | None = None,
    ) -> Array:
        """Returns embedded tokens after positions and all layers, before the last norm.

        Raises ValueError for a grid that does not fit the rows.
        """
        if coordinates_BTA is None:
            grids.check_grid(type(self).__name__, self.grid, x_BTD.shape[1], segment_ids_BT)
        if self.position_embedding != "none":
            positions = md_tpe.make(
                self.position_embedding, self.grid, param_dtype=self.param_dtype, name="positions"
            )
            place = mixers.Layer(0, len(self.mixers), coordinates_BTA=coordinates_BTA)
            x_BTD = positions(x_BTD, segment_ids_BT, layer=place)
        if self.float32_residual:
            x_BTD = x_BTD.astype(jnp.float32)
        x_BTD, _ = self.run_layers(
            sharding.constrain(x_BTD),
            segment_ids_BT,
            coordinates_BTA=coordinates_BTA,
            condition_BTD=condition_BTD,
        )
        return x_BTD


class Encoder(GridModel):
    """A classifier of documents or tokens: logits_BTW = encoder(inputs, segment_ids_BT=None).

    Inputs are patches x_BTE, embedded by a dense layer, or with a vocab_size token ids (B, T). All
    mixers may be used, causal ones too; none has a state. Logits are float32:

        logits = W norm(h) + b            pooling "token": of each token's own hidden state h
        logits = W mean(norm(h)) + b      pooling "mean": of the mean over a token's document

    W starts at 0. Documents are runs of equal segment ids; each row is one where there are none.

    Args:
      coordinates_BTA: each token's coordinates (`mixers.Layer`), for point sets and for grids whose
        tokens come in another order than row by row.

    Attributes: those of `GridModel`, and
      num_classes: number of classes W.
      vocab_size: number of token ids; 0: inputs are patches.
      pooling: "mean" or "token".
    """

    d_model: int
    mixers: tuple[pattern.MixerSpec, ...]
    num_classes: int
    vocab_size: int = 0
    pooling: str = "mean"

    choices = {**GridModel.choices, "pooling": ("mean", "token")}
    positive = (*GridModel.positive, "num_classes")

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        segment_ids_BT: Array | None = None,
        coordinates_BTA: Array | None = None,
    ) -> Array:
        if self.vocab_size:
            init = layers.partitioned(nn.initializers.normal(0.02), ("vocab", "embed"))
            shape = (self.vocab_size, self.d_model)
            table_WD = self.param("embedding", init, shape, self.param_dtype)
            x_BTD = operators.embedding(table_WD.astype(self.dtype), inputs)
        else:
            x_BTD = self.embed_patches(inputs)
        x_BTD = self.hidden(x_BTD, segment_ids_BT, coordinates_BTA)
        x_BTD = norms.apply(self.norm, self.norm_eps, "final_norm", x_BTD, segment_ids_BT)
        if self.pooling == "mean":
            x_BTD = document_mean(x_BTD, segment_ids_BT)
        output = layers.dense(
            self.num_classes,
            "output",
            axes=("embed", None),
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        return output(x_BTD.astype(self.dtype)).astype(jnp.float32)


def document_mean(x_BTD: Array, segment_ids_BT: Array | None) -> Array:
    """Returns the mean over each token's document, at each of its tokens, float32 or wider."""
    x_BT1D = x_BTD[:, :, None]
    totals_BT1D = operators.document_totals(x_BT1D, segment_ids_BT)
    count_BT11 = operators.document_totals(jnp.ones_like(x_BT1D[..., :1]), segment_ids_BT)
    return (totals_BT1D / count_BT11)[:, :, 0]
