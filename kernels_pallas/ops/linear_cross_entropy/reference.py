"""Losses of next-token logits by their definitions, with all logits at once."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.common import matmul

# A loss is hashable: (logits (B,T,W), per_token, fixed, learned) -> (loss (B,T), details).
# Details have no gradient; of the arguments, logits and `learned` have one.


class TokenDetails(NamedTuple):
    """Details of `linear_cross_entropy` per token, in float32 or wider, masked tokens included.

    nll_BT: -log p(label).
    log_z_BT: the log-sum-exp of the logits.
    correct_BT: 1 where no word is likelier than the label, else 0.
    """

    nll_BT: jax.Array
    log_z_BT: jax.Array
    correct_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The loss -log p(label) + z_loss log_z^2 as a function of logits (B, T, W), with its details.

    per_token is (labels, mask), learned is z_loss. words_axis: the mesh axis that words are split
    over, or None. Details are `TokenDetails`.
    """

    softcap: float | None
    words_axis: str | None = None

    def __call__(self, logits_BTW, per_token, fixed, z_loss):
        labels_BT, mask_BT = per_token
        logits_BTW = capped(logits_BTW, self.softcap)
        largest_BT = jax.lax.stop_gradient(jnp.max(logits_BTW, axis=-1))
        first_word = 0
        if self.words_axis is None:
            log_z_BT = jax.nn.logsumexp(logits_BTW, axis=-1)
        else:
            first_word = jax.lax.axis_index(self.words_axis) * logits_BTW.shape[-1]
            largest_BT = jax.lax.pmax(largest_BT, self.words_axis)
            z_BT = self._sum(jnp.exp(logits_BTW - largest_BT[..., None]))
            log_z_BT = largest_BT + jnp.log(z_BT)
        # As a sum over W: a gather, and its gradient's scatter, are slow on accelerators.
        # Not in the labels' dtype: bytes would count 256 words and more from 0 again.
        word_W = first_word + jnp.arange(logits_BTW.shape[-1], dtype=jnp.int32)
        chosen_BTW = word_W[None, None] == labels_BT[..., None]
        label_logit_BT = self._sum(jnp.where(chosen_BTW, logits_BTW, 0))
        nll_BT = log_z_BT - label_logit_BT
        correct_BT = (label_logit_BT >= largest_BT).astype(nll_BT.dtype)
        details = jax.lax.stop_gradient(TokenDetails(nll_BT, log_z_BT, correct_BT))
        return masked(nll_BT + z_loss.astype(log_z_BT.dtype) * log_z_BT**2, mask_BT), details

    def _sum(self, x_BTW):
        """Sums (B, T, W) over all words, those of other devices included."""
        x_BT = jnp.sum(x_BTW, axis=-1)
        return x_BT if self.words_axis is None else jax.lax.psum(x_BT, self.words_axis)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The loss KL(teacher || student) as a function of the student's logits (B, T, W).

    per_token is (the teacher's hidden states, or its logits where teacher_layout is None; mask),
    fixed the teacher's matrix and bias. It has no details.
    """

    softcap: float | None
    teacher_softcap: float | None
    temperature: float
    teacher_layout: str | None

    def __call__(self, logits_BTW, per_token, fixed, learned):
        teacher_BTW, mask_BT = per_token
        if self.teacher_layout is not None:
            teacher_BTW = all_logits(teacher_BTW, fixed[0], fixed[1], self.teacher_layout)
        teacher_BTW = capped(teacher_BTW.astype(logits_BTW.dtype), self.teacher_softcap)
        log_p_BTW = jax.nn.log_softmax(teacher_BTW / self.temperature, axis=-1)
        log_q_BTW = jax.nn.log_softmax(capped(logits_BTW, self.softcap) / self.temperature, axis=-1)
        # p log p is 0 where p is: a teacher may have ruled a word out with a logit of -inf
        p_BTW = jnp.exp(log_p_BTW)
        difference_BTW = jnp.where(p_BTW > 0, log_p_BTW - log_q_BTW, 0)
        return masked(jnp.sum(p_BTW * difference_BTW, axis=-1), mask_BT), ()


def capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def masked(loss_BT, mask_BT):
    return loss_BT if mask_BT is None else jnp.where(mask_BT, loss_BT, 0)


def unmasked(x_BTD, mask_BT):
    """Returns x with 0 for masked tokens: NaN and Inf there reach neither loss nor gradient."""
    if mask_BT is None or not jnp.issubdtype(x_BTD.dtype, jnp.floating):
        return x_BTD
    return jnp.where(mask_BT[..., None], x_BTD, 0)


def all_logits(x_BTD, matrix, bias_W, layout: str):
    """Computes logits, x matrix^T ("WD") or x matrix ("DW"), plus bias, in float32 or wider."""
    logits_BTW = matmul.einsum(f"btd,{layout.lower()}->btw", x_BTD, matrix)
    return (
        logits_BTW if bias_W is None else logits_BTW + bias_W[None, None].astype(logits_BTW.dtype)
    )


def whole(loss, layout, chunk_size, x_BTD, matrix, bias_W, per_token, fixed, learned):
    """Computes `loss` from all logits at once, with its details; arguments as in `chunked.run`."""
    del chunk_size
    per_token, fixed = jax.lax.stop_gradient((per_token, fixed))
    arrays = jax.lax.stop_gradient((x_BTD, matrix, bias_W))
    _, details = loss(all_logits(*arrays, layout), per_token, fixed, jax.lax.stop_gradient(learned))
    given, mask_BT = per_token
    x_BTD, given = (unmasked(z, mask_BT) for z in (x_BTD, given))
    logits_BTW = all_logits(x_BTD, matrix, bias_W, layout)
    return loss(logits_BTW, (given, mask_BT), fixed, learned)[0], details
