"""A small encoder of handwritten digits, one pixel per token, that several claims train."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from seqmodels import mixers
from seqmodels.mixers import whole_document
from seqmodels.modules import feature_maps, pattern

HEADS = 2
SOFTMAX = f"full_attention(num_heads={HEADS})"
LINEAR = f"whole_document(num_heads={HEADS}, q_map='relu', use_bias=True)"


def train(context, pattern: str, seed: int, **changes):
    """Trains two layers of width 32 for 600 steps of 32 images; returns the `Run`."""
    size = {"d_model": 32, "num_layers": 2}
    config = digits.get_config("linear_attention,pixels")
    fields = {f"model.{name}": value for name, value in size.items()} | {
        "model.pattern": pattern,
        "model.scan_layers": False,
        "data.batch_size": 32,
        "data.shift": 0,
        "train.steps": 600,
        "train.eval_every": 600,
        "train.log_every": 100,
        "checkpoint.every": 600,
    }
    return context.train(config, fields | changes, seed=seed)


def captured(run, names: tuple[str, ...], batch: dict) -> list[dict[str, np.ndarray]]:
    """Returns what parts of each layer's mixer return for a batch, {name: array (B, T, ...)}.

    names: of the parts: "q", "k" and "v" are projections, "mixer" is the mixer's whole output.
    """

    @jax.jit
    def apply(params, inputs, segment_ids):
        _, variables = run.model.apply(
            {"params": params},
            inputs,
            segment_ids,
            capture_intermediates=lambda module, method: module.name in names,
            mutable="intermediates",
        )
        return variables["intermediates"]

    intermediates = apply(run.params, batch["inputs"], batch["segment_ids"])
    layers = []
    for i in range(run.config.model.num_layers):
        found = intermediates[f"block_{i}"]["mixer"]
        of_parts = {name: found[name]["__call__"][0] for name in names if name in found}
        if "mixer" in names:
            of_parts["mixer"] = found["__call__"][0][0]
        layers.append({name: np.asarray(x) for name, x in of_parts.items()})
    return layers


def mixer_of(run) -> mixers.Mixer:
    """Returns the mixer of a run's layers, which are alike."""
    spec = pattern.parse(run.config.model.pattern)[0]
    return mixers.make(spec.name, d_model=run.config.model.d_model, **dict(spec.options))


def split(x_BTE: np.ndarray) -> jax.Array:
    """Returns a projection with its heads apart, (B, T, H, K)."""
    return jnp.asarray(x_BTE).reshape(*x_BTE.shape[:2], HEADS, -1)


def weights(mixer, q_BTHK, k_BTHK) -> np.ndarray:
    """Returns the weights (B, H, T, T) that a mixer without rotation gives rows of one document."""
    products = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK)
    scale = q_BTHK.shape[-1] ** -0.5
    if not isinstance(mixer, whole_document.AffineLinearAttention):
        return np.asarray(jax.nn.softmax(scale * products, axis=-1))
    q_BTHF, k_BTHF = (
        feature_maps.FeatureMap(kind).apply({}, x)
        for kind, x in ((mixer.q_map, q_BTHK), (mixer.k_map or mixer.q_map, k_BTHK))
    )
    products = jnp.einsum("BTHF,BSHF->BHTS", q_BTHF, k_BTHF)
    sums_BHT1 = jnp.sum(products, axis=-1, keepdims=True)
    count = jnp.full_like(sums_BHT1, q_BTHK.shape[1])
    correct = whole_document.CORRECTIONS[mixer.correction]
    a_BHT1, b_BHT1 = correct(sums_BHT1, count, scale, mixer.eps)
    return np.asarray(a_BHT1 * products + (0.0 if b_BHT1 is None else b_BHT1))
