"""Builds optimizers by name, all of this structure:

    clip by global norm -> direction -> + weight_decay * parameter (masked) -> * -learning rate

Updates are computed, and the optimizer state is stored, in float32 even where parameters are
narrower: in float16 Adam's eps is 0, and so are the squares of small gradients.

Scanned layers' parameters are stacked along a leading axis, "layers". Whether a parameter is a
matrix, a vector or a scalar is judged without that axis, by the axis names of its box (Flax's
metadata wrapper). The box's class says whether weight decay applies and whether the parameter is a
linear map (`seqmodels.modules.layers`).
"""

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from experiments.training.schedules import Schedule
from seqmodels.modules import layers


def path_name(path) -> str:
    """Returns a JAX key path, such as one of tree_flatten_with_path, as text "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def rank(leaf) -> int:
    """Returns a parameter's number of axes, without the axis "layers" that a scan over layers adds.

    leaf: the parameter in its box, as `init` returns it. An array without a box counts as not
      stacked.
    """
    if layers.is_boxed(leaf):
        return leaf.unbox().ndim - list(leaf.names).count("layers")
    return leaf.ndim


def _map(function, boxed_params):
    return jax.tree.map(function, boxed_params, is_leaf=layers.is_boxed)


def decay_mask(boxed_params) -> dict:
    """Returns a tree, True for parameters to decay: rank 2 or more, not `layers.Undecayed`."""
    return _map(
        lambda leaf: rank(leaf) >= 2 and not isinstance(leaf, layers.Undecayed), boxed_params
    )


def muon_dimensions(boxed_params) -> dict:
    """Returns a tree of linear maps' (`layers.Kernel`) input and output axes, None for others."""
    numbers = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return _map(lambda leaf: numbers if isinstance(leaf, layers.Kernel) else None, boxed_params)


def _adam(config, boxed_params):
    """Returns Adam's direction, m / (sqrt(v) + eps), for AdamW (arXiv 1711.05101) and LAMB."""
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _muon(config, boxed_params):
    """Returns Muon's direction (orthogonalised momentum) for matrices, and Adam's for the rest.

    Matrix updates are scaled to an rms of 0.2, like Adam's, so that one learning rate serves both
    (Moonlight, arXiv 2502.16982, section 2.2).
    """
    return contrib.muon(
        learning_rate=-1.0,  # a direction: the sign and the rate come after weight decay
        beta=0.95,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_dimensions(boxed_params),
    )


_DIRECTIONS = {
    "adamw": _adam,
    "lamb": _adam,
    # Lion (arXiv 2302.06675): the sign of an interpolated momentum.
    "lion": lambda config, _: optax.scale_by_lion(config.b1, config.b2),
    "muon": _muon,
    # Adam without its first moment, in whose place Schedule-Free interpolates parameters.
    "schedule_free": lambda config, _: optax.scale_by_rms(
        config.b2, config.eps, eps_in_sqrt=False, bias_correction=True
    ),
    "sgd": lambda config, _: optax.trace(config.b1),  # with momentum b1
}


def names() -> list[str]:
    """Returns the names of all optimizers."""
    return sorted(_DIRECTIONS)


# These update each element of a parameter by itself, so that a host can do it for its own part.
ELEMENTWISE = ("adamw", "lion", "schedule_free", "sgd")


def make_optimizer(
    config, schedule: Schedule, boxed_params, offload: bool = False
) -> optax.GradientTransformation:
    """Returns the optimizer `config.name`: adamw, lamb, lion, muon, schedule_free or sgd.

    config: the fields name, b1, b2, eps, weight_decay, and clip, the largest global norm of the
      gradient (None or 0: no limit).
    schedule: function from the step to the learning rate.
    boxed_params: parameters as `init` returns them. Only shapes, axis names and classes are read.
    offload: whether the update runs on the host. Then `clip` has to run before it on the devices,
      where the whole gradient's norm is known. The state has the same structure.

    Raises ValueError for an unknown name, one that cannot be offloaded, or numbers out of range.
    """
    if config.name not in _DIRECTIONS:
        raise ValueError(f"unknown optimizer {config.name!r}; choose one of {', '.join(names())}")
    if offload and config.name not in ELEMENTWISE:
        raise ValueError(
            f"optimizer {config.name!r} reads whole matrices, so it cannot be offloaded to a host "
            "that holds parts of them; "
            f"set parallel.offload=False, or take one of {', '.join(ELEMENTWISE)}"
        )
    if config.clip and config.clip < 0:
        raise ValueError(f"optimizer.clip is {config.clip}; it must be positive, or 0 for none")
    for name in ("b1", "b2"):
        if not 0 <= config[name] < 1:
            raise ValueError(
                f"optimizer.{name} is {config[name]}; it must be at least 0, and less than 1"
            )
    if config.name == "schedule_free" and not config.b1:
        raise ValueError("optimizer.b1 is 0; schedule_free's average needs more than that")
    for name in ("learning_rate", "eps", "weight_decay"):
        if config[name] < 0:
            raise ValueError(f"optimizer.{name} is {config[name]}; it must be at least 0")
    clip_by_norm = optax.identity() if offload else optax.clip_by_global_norm(config.clip)
    chain = [clip_by_norm] if config.clip else []
    chain.append(_DIRECTIONS[config.name](config, boxed_params))
    chain.append(optax.add_decayed_weights(config.weight_decay, decay_mask(boxed_params)))
    if config.name == "lamb":
        chain.append(scale_by_trust_ratio(_map(rank, boxed_params)))
    optimizer = optax.chain(*chain, optax.scale_by_learning_rate(schedule))
    if config.name == "schedule_free":
        optimizer = contrib.schedule_free(optimizer, schedule, b1=config.b1)
    return _in_float32(optimizer)


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(grads, state, params):
        return optimizer.update(widened(grads), state, widened(params))

    return optax.GradientTransformation(lambda params: optimizer.init(widened(params)), update)


def widened(tree):
    """Returns a tree of arrays in which those narrower than float32 are cast to float32."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def clip(config, grads):
    """Returns gradients scaled to a global norm of at most `config.clip`, for offloaded updates."""
    if not config.clip:
        return grads
    return optax.clip_by_global_norm(config.clip).update(grads, optax.EmptyState())[0]


def scale_by_trust_ratio(rank_tree) -> optax.GradientTransformation:
    """Returns the transformation u <- u |p| / |u|, of u alone where a norm is 0.

    u is an update and p its parameter; norms are per layer (LAMB, arXiv 1904.00962, algorithm 2).

    rank_tree: each parameter's number of axes within one layer.
    """

    def rescale(u, p, rank):
        axes = tuple(range(u.ndim - rank, u.ndim))
        p_norm, u_norm = (jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (p, u))
        usable = (p_norm > 0) & (u_norm > 0)
        return u * jnp.where(usable, p_norm / jnp.where(usable, u_norm, 1), 1)

    def update(updates, state, params):
        return jax.tree.map(rescale, updates, params, rank_tree), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def evaluation_params(params, opt_state):
    """Returns Schedule-Free's averaged parameters (arXiv 2405.15682); `params` for others."""

    def is_average(x):
        return isinstance(x, contrib.ScheduleFreeState)

    for part in jax.tree.leaves(opt_state, is_leaf=is_average):
        if is_average(part):
            return contrib.schedule_free_eval_params(part, params)
    return params
