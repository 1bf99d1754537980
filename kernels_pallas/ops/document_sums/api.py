"""Linear attention over whole documents, without an order in time: the public function."""

import jax

from kernels_pallas.common import arguments
from kernels_pallas.ops.document_sums import reference


def document_sums(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    block_size: int | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Reads the sum of keys times values over each token's whole document:

        S_d = initial_state (row's first document only) + sum_{s in d} k_s v_s^T
        o_t = scale * S_{d(t)}^T q_t

    With `block_size` C it is block-causal: t reads the tokens of its own block of C tokens and of
    earlier ones, blocks counted from the document's start.

    Args:
      q_BTHK, k_BTHK, v_BTHV, scale, initial_state, segment_ids, chunk_size, implementation: as for
        `linear_attention`.
      block_size: tokens per block; None is one block per document.

    Returns:
      o_BTHV in v's dtype, and S (B, H, K, V) of the row's last document, in float32 or wider.
    """
    del implementation
    name = "document_sums"
    arguments.check_scale(name, scale)
    arguments.check_count(name, "block_size", block_size)
    inputs = q_BTHK, k_BTHK, v_BTHV, None, initial_state, segment_ids, chunk_size
    call = arguments.recurrence(name, *inputs, state_as_wide_as_all=True)
    H = v_BTHV.shape[2]
    return reference.dense(
        arguments.repeat_heads(q_BTHK, H),
        arguments.repeat_heads(k_BTHK, H),
        v_BTHV,
        call["initial_state_BHKV"],
        segment_ids,
        q_BTHK.shape[-1] ** -0.5 if scale is None else float(scale),
        block_size,
    )
