"""Optimizers by name, all of one form, and which parameters each part of them touches.

    clip by global norm -> direction -> + weight_decay * parameter (masked) -> * -learning rate

Parameters of layers that are scanned over are stacked: their arrays have a leading "layers" axis. What a parameter *is* (matrix,
vector, scalar) is judged without it, so `ranks` reads the logical axis names off the boxed parameters.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from optax import contrib

from experiments.schedules import Schedule

# Never decayed, whatever their rank. This is the one place: a mixer that has another such parameter adds its name here.
# Parameters that are vectors or scalars within a layer (biases, norm scales) are never decayed anyway.
NEVER_DECAYED = re.compile(
    r"(^|/)(bias|scale|D|theta|A_log|dt_bias|[^/]*_(log|bias)|lower_bounds?[^/]*|[^/]*norm[^/]*(/.*)?)$"
)
# Matrices by shape that are no linear maps between activations: Muon leaves them to Adam.
NOT_MUON = re.compile(r"(^|/)(embed|output|[^/]*conv[^/]*)(/|$)")


def path_name(path) -> str:
    """A jax key path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def ranks(boxed_params) -> dict:
    """The number of axes of each parameter within one layer: its array's, less the "layers" axes of a scan.

    boxed_params: parameters (abstract or not) as `init` gives them, boxed with their logical axis names; unboxed ones count
    as not stacked. Returns a tree of the unboxed parameters' structure.
    """

    def rank(leaf):
        if isinstance(leaf, nn.meta.AxisMetadata):
            return leaf.unbox().ndim - list(leaf.names).count("layers")
        return leaf.ndim

    return jax.tree.map(rank, boxed_params, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def decay_mask(rank_tree) -> dict:
    """True for the parameters that weight decay may touch: of rank 2 and more within a layer, and not `NEVER_DECAYED`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, rank: rank >= 2 and not NEVER_DECAYED.search(path_name(path)), rank_tree
    )


def muon_dimensions(rank_tree) -> dict:
    """For the kernels of linear layers which axes are input and output (stacked layers are a batch); None for all else."""

    def dimensions(path, rank):
        name = path_name(path)
        if rank == 2 and name.endswith("kernel") and not NOT_MUON.search(name):
            return contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return None

    return jax.tree_util.tree_map_with_path(dimensions, rank_tree)


def _adam(config, rank_tree):
    """AdamW (arXiv 1711.05101)."""
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _lion(config, rank_tree):
    """Lion (arXiv 2302.06675): the sign of an interpolated momentum."""
    return optax.scale_by_lion(config.b1, config.b2)


def _sgd(config, rank_tree):
    """Momentum b1."""
    return optax.trace(config.b1)


def _muon(config, rank_tree):
    """Muon: the momentum of each matrix, orthogonalised; Adam for the rest. The update's rms is 0.2 as Adam's is, so one learning rate
    serves both (Moonlight, arXiv 2502.16982, section 2.2)."""
    return contrib.muon(
        learning_rate=-1.0,  # a direction: the sign and the rate come after weight decay
        beta=0.95,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_dimensions(rank_tree),
    )


def _rms(config, rank_tree):
    """Adam without its first moment, which Schedule-Free puts in another place."""
    return optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)


_DIRECTIONS = {
    "adamw": _adam,
    "lamb": _adam,
    "lion": _lion,
    "muon": _muon,
    "schedule_free": _rms,
    "sgd": _sgd,
}


# Each element of a parameter is updated by itself, which a host can do for its devices' parts.
ELEMENTWISE = ("adamw", "lion", "schedule_free", "sgd")


def make_optimizer(
    config, schedule: Schedule, boxed_params, offload: bool = False
) -> optax.GradientTransformation:
    """The optimizer `config.name`: adamw, lamb, lion, muon, schedule_free or sgd.

    config: name, b1, b2, eps, weight_decay, clip (maximum global norm of the gradient; None or 0 for none).
    boxed_params: see `ranks`; only shapes and names are read.
    offload: the update runs on the host, after `clip` has run on the devices, where the norm of all parts is known. The state
      is of the same form.

    Raises ValueError for an unknown name, one that cannot be offloaded, or a negative clip.
    """
    if config.name not in _DIRECTIONS:
        raise ValueError(
            f"unknown optimizer {config.name!r}; choose one of {', '.join(sorted(_DIRECTIONS))}"
        )
    if offload and config.name not in ELEMENTWISE:
        raise ValueError(
            f"optimizer {config.name!r} reads whole matrices, so it cannot be offloaded to a host that holds parts of them; "
            f"set parallel.offload=False, or take one of {', '.join(ELEMENTWISE)}"
        )
    if config.clip and config.clip < 0:
        raise ValueError(f"optimizer.clip is {config.clip}; it must be positive, or 0 for none")
    rank_tree = ranks(boxed_params)
    clip_by_norm = optax.identity() if offload else optax.clip_by_global_norm(config.clip)
    chain = [clip_by_norm] if config.clip else []
    chain.append(_DIRECTIONS[config.name](config, rank_tree))
    chain.append(optax.add_decayed_weights(config.weight_decay, decay_mask(rank_tree)))
    if config.name == "lamb":
        chain.append(scale_by_trust_ratio(rank_tree))
    optimizer = optax.chain(*chain, optax.scale_by_learning_rate(schedule))
    if config.name == "schedule_free":
        optimizer = contrib.schedule_free(optimizer, schedule, b1=config.b1)
    return optimizer


def clip(config, grads):
    """The gradients, their global norm at most `config.clip`; for updates that are offloaded."""
    if not config.clip:
        return grads
    return optax.clip_by_global_norm(config.clip).update(grads, optax.EmptyState())[0]


def scale_by_trust_ratio(rank_tree) -> optax.GradientTransformation:
    """u <- u |p| / |u| with the norms of one layer's parameter (LAMB, arXiv 1904.00962, algorithm 2); where one is 0, u stays."""

    def rescale(u, p, rank):
        axes = tuple(range(u.ndim - rank, u.ndim))
        p_norm, u_norm = (jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (p, u))
        usable = (p_norm > 0) & (u_norm > 0)
        return u * jnp.where(usable, p_norm / jnp.where(usable, u_norm, 1), 1)

    def update(updates, state, params):
        return jax.tree.map(rescale, updates, params, rank_tree), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def evaluation_params(params, opt_state):
    """The parameters to evaluate and sample with: Schedule-Free's average (arXiv 2405.15682), else `params`."""

    def is_average(x):
        return isinstance(x, contrib.ScheduleFreeState)

    for part in jax.tree.leaves(opt_state, is_leaf=is_average):
        if is_average(part):
            return contrib.schedule_free_eval_params(part, params)
    return params
