"""Names of operators' results, by which a policy of `jax.checkpoint` can save them.

A layer recomputed in the backward pass runs its operators twice, unless its policy saves these:

    jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(
        remat.OPERATOR_RESIDUALS, remat.ENTERING_STATES))
"""

import jax
from jax.ad_checkpoint import checkpoint_name

OPERATOR_RESIDUALS = "operator_residuals"  # results, and the states that the backward pass reads
ENTERING_STATES = "entering_states"  # received from another shard, each as large as one token's


def named(arrays, name: str = OPERATOR_RESIDUALS):
    """Returns a pytree whose arrays carry a name by which a checkpoint policy can select them."""
    return jax.tree.map(lambda x: checkpoint_name(x, name), arrays)
