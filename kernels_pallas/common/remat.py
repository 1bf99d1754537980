"""What of an operator a caller that recomputes the rest may keep: its results, and the states its
backward pass reads.

jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(kept.NAME,
kept.EXCHANGED))
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "operator"
EXCHANGED = "exchanged"  # a state from another part of the mesh: as large as a token's, and sent again if it is not kept


def kept(arrays, name: str = NAME):
    """The arrays, with the name that such a policy goes by."""
    return jax.tree.map(lambda x: checkpoint_name(x, name), arrays)
