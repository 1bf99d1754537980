"""Losses per token for the stages that turn a softmax transformer into a linear-time model.

They run a student and its teacher on one batch; both are language models, encoders or denoisers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas import linear_kl_divergence
from seqmodels import denoiser, encoder, language_model, operators
from seqmodels.array_typing import Array
from seqmodels.linearize import batches, layer_trees, partition, transfer
from seqmodels.modules import blocks, stack


def transfer_loss(
    model: stack.Stack,
    params: dict[str, Any],
    batch: dict[str, Array],
    weights: dict[str, float],
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of layer-by-layer transfer per token, and losses to report, (B, T) each.

    The loss is the sum of weights[name] * losses[name], with `transfer.losses` of student and
    teacher layers. Those of an encoder, whose loss counts once per document, are means over each
    token's document, so that every token counts and padding does not.

    batch: as `batches.arguments` reads it. weights: by name of a loss, such as "mixer".

    Raises ValueError for a weight of a loss that no layer gives.
    """
    found = transfer.losses(model, params, batch)
    if isinstance(model, encoder.Encoder):
        found = {name: _document_mean(x_BT, batch["segment_ids"]) for name, x_BT in found.items()}
    used = {name: weight for name, weight in weights.items() if weight}
    if missing := sorted(set(used) - set(found)):
        raise ValueError(
            f"transfer: no converted layer gives {missing[0]!r}; they give {', '.join(sorted(found)) or 'nothing'}"
        )
    zero_BT = jnp.zeros(batch["segment_ids"].shape, jnp.float32)
    loss_BT = sum((weight * found[name] for name, weight in used.items()), start=zero_BT)
    reported = {name: found[name] for name in {*used, "relative"}}
    return loss_BT, {"loss": loss_BT} | reported


def distillation(
    student: tuple[language_model.LanguageModel, dict[str, Any]],
    teacher: tuple[language_model.LanguageModel, dict[str, Any]] | None,
    batch: dict[str, Array],
    *,
    ce: float = 1.0,
    kl: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss ce * cross-entropy + kl * t^2 * KL(teacher || student), and metrics by name.

    All are per token, (B, T). In the KL divergence both models' logits are divided by t =
    `temperature`; the factor t^2 keeps the size of gradients (Hinton et al., arXiv 1503.02531,
    section 2). Losses are computed from hidden states, without all logits in memory.

    student, teacher: (model, parameters); the teacher is run only where kl is not 0.
    batch: arrays "inputs", "labels" and "segment_ids", (B, T).
    """
    model, params = student
    x_BTD, matrix, layout = _hidden(model, params, batch)
    loss_BT, metrics = jnp.zeros(batch["inputs"].shape, jnp.float32), {}
    ce_BT, details = operators.linear_cross_entropy(
        x_BTD, matrix, batch["labels"], layout=layout, logit_softcap=model.logit_softcap
    )
    if ce:
        loss_BT = loss_BT + ce * ce_BT
    if kl and teacher is not None:
        other, other_params = teacher
        theirs_BTE, their_matrix, their_layout = _hidden(
            other, jax.lax.stop_gradient(other_params), batch
        )
        kl_BT = linear_kl_divergence(
            x_BTD, matrix, theirs_BTE, their_matrix, layout=layout, teacher_layout=their_layout,
            logit_softcap=model.logit_softcap, teacher_logit_softcap=other.logit_softcap,
            temperature=temperature,
        )  # fmt: skip
        loss_BT = loss_BT + kl * temperature**2 * kl_BT
        metrics["kl"] = kl_BT
    metrics |= {"loss": loss_BT, "nll": details.nll_BT, "accuracy": details.correct_BT}
    return loss_BT, metrics


def _hidden(model, params, batch):
    """Runs a model up to its logits; returns x_BTD, its output matrix and that one's layout."""
    inputs = batch["inputs"], batch["segment_ids"]
    return model.apply({"params": params}, *inputs, head=lambda *hidden: hidden)[0]


def class_distillation(
    student_BTW: Array,
    teacher_BTW: Array,
    labels_BT: Array,
    *,
    ce: float = 1.0,
    kl: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """Returns `distillation`'s loss of a few classes, (B, T), from both models' whole logits.

    No gradient reaches the teacher.
    """
    teacher_BTW = jax.lax.stop_gradient(teacher_BTW)
    log_p_BTW = jax.nn.log_softmax(student_BTW, axis=-1)
    ce_BT = -jnp.take_along_axis(log_p_BTW, labels_BT[..., None], axis=-1)[..., 0]
    correct_BT = (jnp.argmax(student_BTW, axis=-1) == labels_BT).astype(jnp.float32)
    theirs_BTW, own_BTW = (
        jax.nn.log_softmax(x_BTW / temperature, axis=-1) for x_BTW in (teacher_BTW, student_BTW)
    )
    kl_BT = jnp.sum(jnp.exp(theirs_BTW) * (theirs_BTW - own_BTW), axis=-1)
    loss_BT = ce * ce_BT + kl * temperature**2 * kl_BT
    return loss_BT, {"loss": loss_BT, "nll": ce_BT, "accuracy": correct_BT, "kl": kl_BT}


class Denoised(NamedTuple):
    """Fields of what a denoiser makes of a batch, for `denoising_distillation`.

    prediction_BTE: the predicted noise, or velocity. variance_BTE: its second output, by which
      `diffusion.log_variance` gives the variance of a step; None for denoisers without one.
      features: the hidden states after each layer, (B, T, D); () where they are not compared.
    """

    prediction_BTE: Array
    variance_BTE: Array | None = None
    features: Sequence[Array] = ()


def denoising_distillation(
    loss_BT: Array,
    student: Denoised,
    teacher: Denoised,
    *,
    noise: float = 0.5,
    variance: float = 0.05,
    features: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Returns a denoiser's loss with a teacher's outputs as further labels, and metrics by name.

        L = L_simple + noise |e_T - e_S|^2 + variance |s_T - s_S|^2 + features sum_l |h_T - h_S|^2

    All are per token, (B, T), and squares are means over channels; e is the prediction, s the
    output for the variance (LiT has no public code, and says Sigma), and h_l the hidden states
    after layer l. LiT (arXiv 2501.12976, hybrid distillation)
    takes 0.5, 0.05, 0; LinFusion (arXiv 2409.02097) takes 0.5, 0, 0.5. No gradient reaches the
    teacher.

    loss_BT: L_simple, the student's own loss.

    Raises:
      ValueError: a weight of the variance where a model predicts none, or of features where the
        models' layers differ in number or width.
    """
    if variance and (student.variance_BTE is None or teacher.variance_BTE is None):
        raise ValueError(
            f"variance is {variance}, and the student or the teacher predicts no variance: set it "
            "to 0, or take denoisers that do (config.model.learn_variance)"
        )
    shapes = [[h_BTD.shape for h_BTD in model.features] for model in (student, teacher)]
    if features and (shapes[0] != shapes[1] or not shapes[0]):
        raise ValueError(
            f"features is {features}, and the hidden states after layers have shapes {shapes[0]} "
            f"in the student and {shapes[1]} in the teacher: set it to 0, or take a student as deep "
            "and as wide as its teacher"
        )
    terms = {
        "noise": (noise, [(student.prediction_BTE, teacher.prediction_BTE)]),
        "variance": (variance, [(student.variance_BTE, teacher.variance_BTE)]),
        "features": (features, list(zip(student.features, teacher.features))),
    }
    metrics = {}
    for name, (weight, pairs) in terms.items():
        if weight:
            metrics[f"{name}_distance"] = sum(_distance(own, theirs) for own, theirs in pairs)
            loss_BT = loss_BT + weight * metrics[f"{name}_distance"]
    return loss_BT, metrics


def denoised(model: denoiser.Denoiser, params: dict[str, Any], batch, features: bool) -> Denoised:
    """Runs a denoiser on a batch; `features` says whether its hidden states are returned."""

    def keep(call, arguments, keywords, context):
        result = call(*arguments, **keywords)
        if isinstance(context.module, blocks.Block) and context.method_name == "__call__":
            context.module.sow("intermediates", "hidden", result[0])
        return result

    out: Any
    sown: Any = {}
    arguments = {"params": params}, *batches.arguments(model, batch)
    if features:
        with nn.intercept_methods(keep):
            out, sown = model.apply(*arguments, mutable=["intermediates"])
    else:
        out = model.apply(*arguments)
    prediction_BTE, variance_BTE = out if model.learn_variance else (out, None)
    layers = layer_trees.split(model, sown["intermediates"])[1] if features else []
    return Denoised(prediction_BTE, variance_BTE, [layer["hidden"][0] for layer in layers])


def _document_mean(x_BT, segment_ids_BT):
    return encoder.document_mean(x_BT[..., None], segment_ids_BT)[..., 0]


def _distance(own, theirs):
    """Returns the mean square over channels of own - theirs, in float32."""
    difference = own.astype(jnp.float32) - jax.lax.stop_gradient(theirs).astype(jnp.float32)
    return jnp.mean(jnp.square(difference), axis=-1)


def selection_penalty(params: dict[str, Any], target: int, power: float = 2.0) -> Array:
    """Returns (sum_l round(r_l) - target)^2 + sum_l (1 - |2 r_l - 1|^power), l a selective layer.

    LinVideo's penalty (arXiv 2510.08318, eqs. 4-5) drives the share r_l of softmax attention to 0
    or 1, and `target` layers to 1; round has the gradient of the identity. LinVideo lowers `power`
    during training; here it is constant in a stage.

    Raises ValueError for parameters without a selective layer, or a target beyond their number.
    """
    logits = [
        leaf.reshape(-1)
        for path, leaf in partition.flatten(params).items()
        if path.endswith("mixer/mix_logit")
    ]
    count = sum(leaf.size for leaf in logits)
    if not 0 <= target <= count or not count:
        raise ValueError(
            f"select_target is {target}, and the student has {count} selective layers to choose it from"
        )
    r_L = jax.nn.sigmoid(jnp.concatenate(logits))
    rounded_L = r_L + jax.lax.stop_gradient(jnp.round(r_L) - r_L)
    # 1e-6 keeps off zero, where the gradient of a power below 1 is infinite.
    polar = jnp.sum(1.0 - (jnp.abs(2.0 * r_L - 1.0) + 1e-6) ** power)
    return jnp.square(jnp.sum(rounded_L) - target) + polar
