"""The language model: embedding, a stack of blocks by pattern, a norm, and logits."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import core

from kernels_pallas.ops.linear_cross_entropy.reference import all_logits, capped
from seqmodels import mixers, models, operators, sharding
from seqmodels.array_typing import Array, State
from seqmodels.modules import blocks, channel_mixers, layers, norms, pattern, positions, stack

CHOICES = stack.Stack.choices
REMAT_POLICIES = stack.REMAT_POLICIES


@flax.struct.dataclass
class ModelState:
    """Fields of a language model's state, from which prefill and decoding go on.

    Attributes:
      prefix, scanned, suffix: states of the layers, grouped as in `pattern.ScanPlan`; those of
        scanned layers are stacked along a first axis.
      segment_id_B: id of the document that each row's last token belongs to.
      next_position_B: with learned positions, the next token's position in its document; else None.
    """

    prefix: tuple[State, ...]
    scanned: tuple[State, ...]
    suffix: tuple[State, ...]
    segment_id_B: Array
    next_position_B: Array | None = None

    def take_rows(self, rows_N: Array) -> "ModelState":
        """Returns the state of the sequences with the batch indices rows_N, in this order.

        It serves to reorder the beams of a search, to continue a sequence several times, or to drop
        finished ones. (x[rows_N] of each leaf would index layers where these are stacked.)
        """
        taken = blocks.take_rows(dataclasses.replace(self, scanned=()), rows_N)
        scanned = blocks.take_rows(self.scanned, rows_N, axis=1)
        return dataclasses.replace(taken, scanned=scanned)


class LanguageModel(stack.Stack):
    """A language model: logits_BTW, state = model(tokens_BT, segment_ids_BT=None, state=None).

    For training pass no state; then the returned state is None. To prefill or decode pass
    `init_state(batch)` and then the state that the call before returned; a sequence that is fed in
    pieces has the same logits as in one call. A row whose first token has another segment id than
    the state's last token starts from an empty state. Mixers and channel mixers that see later
    tokens are refused when the model is made.

    Args:
      head: a function (x_BTD, matrix, layout) whose result is returned in place of the logits, for
        losses that never hold all logits (`kernels_pallas.linear_cross_entropy`). x_BTD are the
        last hidden states; layout says whether the output matrix is "WD" or "DW".

    Attributes: those of `stack.Stack`, and
      vocab_size: number of token ids W.
      tied_embeddings: whether the output matrix is the embedding.
      embedding_scale: factor of the embedded tokens.
      learned_positions: number of positions in a document that have a learned vector, which is
        added to the token's (GPT-2); None leaves them out.
      logit_softcap: c of c tanh(logits / c) (Gemma 2, arXiv 2408.00118, section 2); None is no cap.
    """

    vocab_size: int
    d_model: int
    mixers: tuple[pattern.MixerSpec, ...]
    tied_embeddings: bool = True
    embedding_scale: float = 1.0
    learned_positions: int | None = None
    logit_softcap: float | None = None

    positive = (*stack.Stack.positive, "vocab_size", "learned_positions", "logit_softcap")

    def __post_init__(self):
        super().__post_init__()
        for spec in dict.fromkeys(self.mixers):
            self._check_causal(spec)

    @nn.nowrap
    def _check_causal(self, spec: pattern.MixerSpec) -> None:
        """Raises ValueError if a layer sees later tokens, or what it computes depends on a batch's.

        The layer's mixer, channel mixer and further options count.
        """
        if not self.make_mixer(spec).causal:
            raise ValueError(
                f"config.model.pattern: {spec.name} sees whole documents, and a language model must "
                f"not see later tokens; causal mixers are {', '.join(mixers.causal_names())}"
            )
        channels = dict(spec.options).get("channel_mixer", self.channel_mixer)
        if channels is not None and getattr(
            channel_mixers.make(channels, parent=None), "uses_tokens", False
        ):
            raise ValueError(
                f"config.model: the channel mixer {channels} sees a token's neighbours, and a language "
                "model must not see later tokens; it is for an encoder or a denoiser"
            )
        if dict(spec.options).get("position_conv"):
            raise ValueError(
                f"config.model.pattern: position_conv of {spec.name} sees a token's neighbours, and a "
                "language model must not see later tokens; it is for an encoder or a denoiser"
            )
        if norms.uses_tokens(self.norm):
            raise ValueError(
                f"config.model.norm is {self.norm!r}, whose statistics are of whole batches, by which "
                "a language model would see later tokens; choose one of " + ", ".join(norms.NORMS)
            )

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        segment_ids_BT: Array | None = None,
        state: ModelState | None = None,
        *,
        head: Callable[[Array, Array, str], Any] | None = None,
    ) -> tuple[Any, ModelState | None]:
        embed = nn.Embed(
            self.vocab_size,
            self.d_model,
            embedding_init=layers.partitioned(
                nn.initializers.normal(self.d_model**-0.5), ("vocab", "embed")
            ),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="embed",
        )
        # Tokens, and learned positions, as vectors.
        x_BTD = operators.embedding(embed.embedding.astype(self.dtype), tokens_BT)
        x_BTD = x_BTD * self.embedding_scale
        next_position_B = None
        if self.learned_positions is not None:
            position_BT = self._positions(tokens_BT, self.learned_positions, segment_ids_BT, state)
            x_BTD = x_BTD + self._position_embedding(position_BT, self.learned_positions)
            next_position_B = position_BT[:, -1] + 1
        if self.float32_residual:
            x_BTD = x_BTD.astype(jnp.float32)
        # The stack, its norm, and the logits or what `head` makes of them.
        x_BTD, state = self._hidden(sharding.constrain(x_BTD), segment_ids_BT, state)
        if state is not None:
            state = dataclasses.replace(state, next_position_B=next_position_B)
        final_norm = norms.make(self.norm, self.norm_eps, name="final_norm")
        x_BTD = final_norm(x_BTD).astype(self.dtype)
        if self.tied_embeddings:
            matrix, layout = embed.embedding, "WD"
        else:
            output = layers.Matrix(
                self.vocab_size, ("embed", "vocab"), self.param_dtype, name="output"
            )
            matrix, layout = output(self.d_model), "DW"
        return (head or self.logits)(x_BTD, matrix.astype(self.dtype), layout), state

    @nn.nowrap
    def logits(self, x_BTD: Array, matrix: Array, layout: str) -> Array:
        """Returns the float32 logits (B, T, W) of hidden states, by the output matrix."""
        return capped(all_logits(x_BTD, matrix, None, layout), self.logit_softcap)

    @nn.nowrap
    def check_length(self, length: int) -> None:
        """Raises ValueError if rows of `length` tokens are longer than the learned positions."""
        if self.learned_positions is not None and length > self.learned_positions:
            raise ValueError(
                f"rows of {length} tokens, and the model has learned {self.learned_positions} "
                "positions: shorten the rows (config.data.seq_len)"
            )

    def _positions(self, tokens_BT, limit, segment_ids_BT, state):
        B, T = tokens_BT.shape
        self.check_length(T)
        offset_B = None
        if state is not None:
            offset_B = state.next_position_B
            if segment_ids_BT is not None:
                offset_B = jnp.where(segment_ids_BT[:, 0] == state.segment_id_B, offset_B, 0)
        position_BT = positions.token_positions(B, T, segment_ids_BT, offset_B)
        if state is not None and not isinstance(position_BT, core.Tracer):
            tokens = int(position_BT.max()) + 1
            if tokens > limit:
                raise ValueError(
                    f"with what the state has read a document comes to {tokens} tokens, and the "
                    f"model has learned {limit} positions"
                )
        return position_BT

    def _position_embedding(self, position_BT, limit):
        init = layers.partitioned(nn.initializers.normal(0.02), ("vocab", "embed"))
        shape = (limit, self.d_model)
        table_PD = self.param("position_embedding", init, shape, self.param_dtype)
        return operators.embedding(table_PD.astype(self.dtype), position_BT)

    def _hidden(self, x_BTD, segment_ids_BT, state):
        """Returns the hidden states after all layers, and the state after the last token."""
        if state is None:
            return self.run_layers(x_BTD, segment_ids_BT)[0], None
        # Rows whose first token starts another document than the state's.
        fresh_B, segment_id_B = None, state.segment_id_B
        if segment_ids_BT is not None:
            fresh_B = segment_ids_BT[:, 0] != segment_id_B
            segment_id_B = segment_ids_BT[:, -1]
        states = state.prefix, state.scanned, state.suffix
        x_BTD, states = self.run_layers(x_BTD, segment_ids_BT, states, fresh_B)
        return x_BTD, ModelState(*typing.cast("stack.States", states), segment_id_B)

    @nn.nowrap
    def init_state(self, batch: int) -> ModelState:
        """Returns the state before the first token of each sequence; works on an unbound module."""
        unknown_B = jnp.full((batch,), -1, jnp.int32)
        start_B = None if self.learned_positions is None else jnp.zeros((batch,), jnp.int32)
        return ModelState(*self.init_states(batch), unknown_B, start_B)


def config_fields() -> dict[str, tuple[Any, Any]]:
    """Returns {field: (type, default)} of a language model's section `model` of a config."""
    return models.fields_of("language_model")


def from_config(config) -> LanguageModel:
    """Makes the LanguageModel that `config`, a config's section `model`, describes.

    Missing fields have the defaults of `config_fields`.

    Raises:
      ValueError: what `models.from_config` raises, and a model that is no language model.
    """
    model = models.from_config(config)
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"config.model.architecture is {config['architecture']!r}, and what is asked for needs "
            "a language_model"
        )
    jax.eval_shape(lambda: model.init_state(1))  # every mixer checks its own options here
    return model
