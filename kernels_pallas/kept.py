"""What of an operator a caller that recomputes the rest may keep: its results, and the states its backward pass reads.

jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(kept.NAME))
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "operator"


def kept(arrays):
    """The arrays, with the name that such a policy goes by."""
    return jax.tree.map(lambda x: checkpoint_name(x, NAME), arrays)
