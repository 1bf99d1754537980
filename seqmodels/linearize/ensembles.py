"""Progressive distillation: a teacher's classes from a growing sum of small students.

    F_0 = 0
    F_i = F_{i-1} + f_i
    L_i = w (CE(F_i, y) + kl t^2 KL(teacher / t || F_i / t))
    w   = 1 + boost TV(teacher, F_{i-1})

F_i are logits, f_i the i-th student's, and F_{i-1} is frozen while f_i is trained. TV is the total
variation distance of the two models' classes, from 0 to 1, so that tokens on which the ensemble so
far disagrees with the teacher count up to 1 + boost times; the first student weighs all alike. A
budget takes the first few students of the sum.

The scheme is progressive ensemble distillation (B-DISTIL, arXiv 2302.10093), which Mamba PKD (arXiv
2503.01727, a number from memory) applies to Mamba. Only the abstracts were read: the algorithm is
from memory, and the form of w is ours.
"""

import jax
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.linearize import objectives


def disagreement(ensemble_BTW: Array, teacher_BTW: Array) -> Array:
    """Returns the total variation distance of two models' classes, (B, T), from their logits."""
    p_BTW, q_BTW = (jax.nn.softmax(x, axis=-1) for x in (ensemble_BTW, teacher_BTW))
    return 0.5 * jnp.sum(jnp.abs(p_BTW - q_BTW), axis=-1)


def loss(
    student_BTW: Array,
    ensemble_BTW: Array | None,
    teacher_BTW: Array,
    labels_BT: Array,
    *,
    kl: float = 1.0,
    temperature: float = 1.0,
    boost: float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss L_i per token, (B, T), and metrics by name.

    student_BTW: f_i. ensemble_BTW: F_{i-1}, None for the first student. teacher_BTW: the teacher's
      logits. No gradient reaches these two.
    """
    weight_BT = jnp.ones(labels_BT.shape, jnp.float32)
    sum_BTW = student_BTW
    if ensemble_BTW is not None:
        ensemble_BTW = jax.lax.stop_gradient(ensemble_BTW)
        weight_BT = weight_BT + boost * jax.lax.stop_gradient(
            disagreement(ensemble_BTW, teacher_BTW)
        )
        sum_BTW = ensemble_BTW + student_BTW

    loss_BT, metrics = objectives.class_distillation(
        sum_BTW, teacher_BTW, labels_BT, kl=kl, temperature=temperature
    )
    loss_BT = weight_BT * loss_BT
    return loss_BT, metrics | {"loss": loss_BT, "weight": weight_BT}
