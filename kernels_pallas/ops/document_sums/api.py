"""Linear attention over whole documents, without an order in time: the public function."""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.common import arguments, chunk_blocks, segments
from kernels_pallas.dispatch import explicit_axes
from kernels_pallas.ops.document_sums import chunked, gpu, naive_chunk, reference, tpu
from kernels_pallas.ops.document_sums.case import CASE, LEAST_BLOCK

IMPLEMENTATIONS = (
    dispatch.Implementation("pallas_tpu", tpu.run, tpu.unsupported_reason, platform="tpu"),
    dispatch.Implementation(
        "triton",
        gpu.run,
        gpu.unsupported_reason,
        platform="gpu",
        passed_over_reason=gpu.passed_over_reason,
    ),
    dispatch.Implementation("chunked", segments.isolated(chunked.run)),
    dispatch.Implementation("naive_chunk", segments.isolated(naive_chunk.run)),
    dispatch.Implementation("reference", segments.isolated(reference.dense)),
)


@explicit_axes.automatic(("BTHV", "BHKV"), q_BTHK="BTGK", v_BTHV="BTHV")
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
    """Computes linear attention over each token's whole document, without an order in time:

        S_d = initial_state (row's first document only) + sum_{s in d} k_s v_s^T
        o_t = scale * S_{d(t)}^T q_t

    This is linear attention (arXiv 2006.16236, eq. 6 without its normaliser), as InLine
    (2412.06590), LiT (2501.12976) and SANA use it over an image. With `block_size` it is
    block-causal, as in SANA-Video (2509.24695): token t reads the tokens s of its own block and of
    earlier ones, blocks counted from the document's start,

        o_t = scale * (initial_state + sum_{s in d(t), block(s) <= block(t)} k_s v_s^T)^T q_t

    Any T, K and V. Reverse mode only (a custom VJP), to any order.

    A whole-document sum has no one-token form: a token's output needs the tokens after it. So there
    is no `step`. Block-causal sums can be computed in pieces of whole blocks, the final state of
    one being the next one's initial state; it stays (B, H, K, V) however many blocks came before.

    Args:
      q_BTHK: (B, T, G, K), floating; G divides H. Key head g serves the value heads from g H/G to
        (g+1) H/G - 1.
      k_BTHK: (B, T, G, K).
      v_BTHV: (B, T, H, V).
      scale: a number; None is K**-0.5. It multiplies the output while that is still float32.
      initial_state: (B, H, K, V), added to the sum that the row's first document reads; None is
        zero.
      segment_ids: integers (B, T). A document is a run of equal ids, and nothing crosses from one
        to another. This holds for NaN and Inf, too, except in kernels (where masks are products
        with 0): in a head with one, the outputs of all tokens that see it are NaN, and no others.
        What overflows in a chunk is not kept apart.
      block_size: tokens per block; None is one block per document.
      chunk_size: a power of two, 16 or more, for packed documents; None is the implementation's
        own. It changes speed and rounding only.
      implementation: 'chunked', 'pallas_tpu', 'triton', 'reference' (O(T^2) memory), or None for
        the best here.

    Returns:
      o_BTHV in v's dtype, and S (B, H, K, V) of the row's last document. States are float32
      (float64 where an input is). Products of bfloat16 q, k and v take them as they are and sum in
      float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, a bad block_size, chunk_size or scale, or an
        unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    name = "document_sums"
    arguments.check_scale(name, scale)
    arguments.check_count(name, "block_size", block_size)
    inputs = q_BTHK, k_BTHK, v_BTHV, None, initial_state, segment_ids, chunk_size
    call = arguments.recurrence(name, *inputs, state_as_wide_as_all=True)
    del call["log_decay_BTHK"]
    if arguments.nothing(q_BTHK, v_BTHV):
        return jnp.zeros_like(v_BTHV), call["initial_state_BHKV"]
    T = v_BTHV.shape[1]
    call["scale"] = q_BTHK.shape[-1] ** -0.5 if scale is None else float(scale)
    call |= {"block_ids_BT": None, "block_size": None}
    if block_size is not None and chunk_blocks.known(T):
        block_size = None if block_size >= T else int(block_size)
    if segment_ids is None and block_size is not None and block_size < LEAST_BLOCK:
        segment_ids = jnp.zeros_like(v_BTHV, jnp.int32, v_BTHV.shape[:2])
    if segment_ids is None:
        call["block_size"] = block_size
    else:
        document_BT = segments.run_index(segment_ids)
        block_BT = segments.block_index(segment_ids, block_size) if block_size else document_BT
        call |= {"segment_ids_BT": document_BT, "block_ids_BT": block_BT}
    return dispatch.run(OPERATOR, implementation, **call)


OPERATOR = dispatch.Operator(document_sums, IMPLEMENTATIONS, CASE)
