"""Losses from hidden states and the output matrix, never holding all logits: public functions."""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.common import arguments, chunk_blocks
from kernels_pallas.dispatch import explicit_axes, manual_axes
from kernels_pallas.ops.linear_cross_entropy import chunked, reference
from kernels_pallas.ops.linear_cross_entropy.reference import TokenDetails

IMPLEMENTATIONS = (
    dispatch.Implementation("chunked", chunked.run),
    dispatch.Implementation("reference", reference.whole),
)
LAYOUTS = ("WD", "DW")


@explicit_axes.automatic("BT", x_BTD="BTD")
def linear_cross_entropy(
    x_BTD: jax.Array,
    matrix: jax.Array,
    labels_BT: jax.Array,
    *,
    layout: str = "WD",
    bias_W: jax.Array | None = None,
    mask_BT: jax.Array | None = None,
    logit_softcap: float | None = None,
    z_loss: float | jax.Array = 0.0,
    chunk_size: int | None = None,
    words_axis: str | None = None,
    details: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, TokenDetails]:
    """Computes each token's cross-entropy from hidden states, holding few tokens' logits at a time:

        logits = x matrix^T + bias      (with a soft cap c: c tanh(logits / c); Gemma 2, arXiv
                                         2408.00118)
        log Z  = logsumexp(logits)
        loss   = log Z - logits[label] + z_loss (log Z)^2      (PaLM, 2204.02311, section 5)

    Memory beside arguments and results: the logits of chunk_size tokens of each row and, backward,
    the gradients; never B x T x W numbers.

    Args:
      x_BTD: (B, T, D), the last norm's output. Where the matrix is bfloat16, too, products take
        both as they are, and sum in float32.
      matrix: (W, D), as a tied embedding is held, or (D, W) with layout="DW", as a dense layer's
        kernel is.
      labels_BT: int (B, T), each in 0 ... W-1 where the mask is not 0. A label outside counts as a
        logit of 0.
      layout: "WD" or "DW", the matrix's axes.
      bias_W: (W,) or None.
      mask_BT: (B, T), bool or numbers. Where it is 0 the loss is 0 and has no gradient, whatever x
        is there. It is no weight.
      logit_softcap: c, a positive number; None caps nothing.
      z_loss: a number, or an array of shape () with a gradient of its own.
      chunk_size: tokens of each row whose logits are held at once; None picks by shape
        (`chunked.heuristic_chunk_size`).
      words_axis: inside `jax.shard_map`, a mesh axis over which the words are split. The matrix and
        the bias hold this rank's words, in the order of ranks, and labels count all words. Logits
        stay where they are; three numbers per token are summed.
      details: whether to also return, for each token, -log p, log Z and whether the label is the
        likeliest word.
      implementation: 'chunked', 'reference' (all logits at once), or None for the best here.

    Returns:
      loss_BT, float32 (or wider). Gradients go to x, the matrix and the bias. With details=True
      also TokenDetails, which have no gradient.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown layout or implementation.
    """
    operator = "linear_cross_entropy"
    _check_product(operator, "x", "matrix", x_BTD, matrix, layout)
    arguments.check_shape(operator, "labels_BT", labels_BT, x_BTD.shape[:2])
    arguments.check_integers(operator, "labels_BT", labels_BT)
    softcap = _softcap(operator, "logit_softcap", logit_softcap)
    arguments.check_number_or_scalar(operator, "z_loss", z_loss)
    arguments.check_flag(operator, "details", details)
    loss = reference.CrossEntropy(softcap, words_axis)
    loss_BT, token_details = _run(
        OPERATOR, loss, layout, chunk_size, implementation,
        x_BTD, matrix, bias_W, labels_BT, mask_BT, (), jnp.asarray(z_loss),
    )  # fmt: skip
    return (loss_BT, token_details) if details else loss_BT


@explicit_axes.automatic("BT", x_BTD="BTD")
def linear_kl_divergence(
    x_BTD: jax.Array,
    matrix: jax.Array,
    teacher_BTE: jax.Array,
    teacher_matrix: jax.Array | None = None,
    *,
    layout: str = "WD",
    bias_W: jax.Array | None = None,
    teacher_layout: str = "WD",
    teacher_bias_W: jax.Array | None = None,
    mask_BT: jax.Array | None = None,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Computes KL(teacher || student) of each token's distribution over words, for distillation
    (Hinton et al., arXiv 1503.02531):

        p = softmax(teacher's logits / temperature)      q = softmax(logits / temperature)
        KL = sum_w p (log p - log q)

    The factor temperature^2, which keeps the size of its gradient, is left out. Logits, masks and
    memory are as in `linear_cross_entropy`.

    Args:
      teacher_BTE: with teacher_matrix: the teacher's hidden states (B, T, E), whose logits are made
        for chunk_size tokens at a time as well. Without: its logits (B, T, W).
      teacher_matrix: (W, E), or (E, W) with teacher_layout="DW".
      temperature: a positive number.
      The others: as for `linear_cross_entropy`; teacher_bias_W and teacher_logit_softcap are the
        teacher's.

    Returns:
      kl_BT, float32 (or wider). Gradients go to x, the matrix and the bias; none to the teacher.

    Raises:
      ValueError: shapes or dtypes that do not fit, a temperature that is not positive, an unknown
        layout or implementation.
    """
    operator = "linear_kl_divergence"
    W = _check_product(operator, "x", "matrix", x_BTD, matrix, layout)
    B, T, _ = x_BTD.shape
    if teacher_matrix is None:
        if teacher_bias_W is not None:
            raise ValueError(
                f"{operator}: teacher_bias_W without teacher_matrix; add it to the logits"
            )
        arguments.check_shape(operator, "teacher_BTE (its logits)", teacher_BTE, (B, T, W))
        arguments.check_float(operator, "teacher_BTE", teacher_BTE)
        fixed = ()
    else:
        teacher_W = _check_product(
            operator, "teacher_BTE", "teacher_matrix", teacher_BTE, teacher_matrix, teacher_layout
        )
        if teacher_W != W or teacher_BTE.shape[:2] != (B, T):
            raise ValueError(
                f"{operator}: teacher and student must share batch, time and vocabulary; got "
                f"{(B, T)} x {W} words and {teacher_BTE.shape[:2]} x {teacher_W}"
            )
        if teacher_bias_W is not None:
            arguments.check_shape(operator, "teacher_bias_W", teacher_bias_W, (W,))
        fixed = (teacher_matrix, teacher_bias_W)
    if temperature is None:
        raise ValueError(f"{operator}: temperature is None; expected a positive number")
    arguments.check_positive(operator, "temperature", temperature)
    loss = reference.Divergence(
        _softcap(operator, "logit_softcap", logit_softcap),
        _softcap(operator, "teacher_logit_softcap", teacher_logit_softcap),
        temperature,
        None if teacher_matrix is None else teacher_layout,
    )
    kl_BT, _ = _run(
        KL_DIVERGENCE, loss, layout, chunk_size, implementation,
        x_BTD, matrix, bias_W, teacher_BTE, mask_BT, fixed, None,
    )  # fmt: skip
    return kl_BT


OPERATOR = dispatch.Operator(linear_cross_entropy, IMPLEMENTATIONS)
KL_DIVERGENCE = dispatch.Operator(linear_kl_divergence, IMPLEMENTATIONS)


def _run(
    operator, loss, layout, chunk_size, implementation,
    x_BTD, matrix, bias_W, given_BT, mask_BT, fixed, learned,
):  # fmt: skip
    B, T, _ = x_BTD.shape
    W = matrix.shape[layout.index("W")]
    if bias_W is not None:
        arguments.check_shape(operator.name, "bias_W", bias_W, (W,))
        arguments.check_float(operator.name, "bias_W", bias_W)
    if mask_BT is not None:
        arguments.check_shape(operator.name, "mask_BT", mask_BT, (B, T))
        mask_BT = mask_BT != 0
    expected = "a positive integer (or None)"
    arguments.check_count(operator.name, "chunk_size", chunk_size, expected)
    chosen = dispatch.choose(operator, implementation)
    if 0 in (B, T):
        none_BT = jnp.zeros_like(x_BTD, arguments.state_dtype(x_BTD, matrix), (B, T))
        return none_BT, TokenDetails(none_BT, none_BT, none_BT)
    if chunk_size is None or not chunk_blocks.known(T):
        chunk_size = chunked.heuristic_chunk_size(B, T, W)
    x_BTD, matrix, bias_W = manual_axes.alike((x_BTD, matrix, bias_W))
    return chosen.call(
        loss, layout, min(chunk_size, T) if chunk_blocks.known(T) else T,
        x_BTD, matrix, bias_W, (given_BT, mask_BT), fixed, learned,
    )  # fmt: skip


def _check_product(operator, name, matrix_name, x_BTD, matrix, layout) -> int:
    """Returns the vocabulary size; raises ValueError if x, the matrix and its layout do not fit."""
    if layout not in LAYOUTS:
        raise ValueError(
            f"{operator}: unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}"
        )
    arguments.check_float(operator, name, x_BTD)
    arguments.check_float(operator, matrix_name, matrix)
    if x_BTD.ndim != 3:
        raise ValueError(f"{operator}: {name} must be (B, T, D); got {x_BTD.shape}")
    if matrix.ndim != 2 or matrix.shape[layout.index("D")] != x_BTD.shape[2]:
        raise ValueError(
            f"{operator}: {matrix_name} must be ({', '.join(layout)}) with {name}'s D = "
            f"{x_BTD.shape[2]}; got {matrix.shape} (layout= says which of its axes is the "
            "vocabulary)"
        )
    if matrix.shape[layout.index("W")] == 0:
        raise ValueError(f"{operator}: {matrix_name} has no words; got {matrix.shape}")
    return matrix.shape[layout.index("W")]


def _softcap(operator, name, softcap):
    arguments.check_positive(operator, name, softcap)
    return softcap
