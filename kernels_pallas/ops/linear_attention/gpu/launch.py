"""Linear attention as Triton kernels, forward and backward, for all four decays (sm80 and later).

Forward: states at chunk boundaries (sequential in chunks, parallel in blocks of the state), then
every chunk's output at once; with a decay per channel the chunks' scores come before. Backward: the
states again, their cotangents the same way in reverse, then dv, dq, dk and dg of every chunk at
once. The residuals are the inputs alone.
"""

from kernels_pallas.common import kernel_vjp
from kernels_pallas.gpu import launch, recurrences
from kernels_pallas.ops.linear_attention import chunked

CHUNK_SIZE = 64
# Words of shared memory per token of a chunk, as compiled for sm_80 and sm_90 with the tiles of
# `tuned.json`.
SHARED_WORDS = {"bfloat16": 224, "float32": 288}


def unsupported_reason(
    *, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, chunk_size, **others
):
    """Returns None if the Triton kernels can run this call, else the reason."""
    if reason := recurrences.unsupported_reason(q_BTGK, v_BTHV, initial_state_BHKV, chunk_size):
        return reason
    form = _form_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, chunk_size=chunk_size)
    return recurrences.too_long(form.K, form.C, SHARED_WORDS[form.dtype])


def _form_of(*arrays, chunk_size):
    return recurrences.TritonForm.of(
        "linear_attention", *arrays, chunk_size=chunk_size, default_chunk=CHUNK_SIZE
    )


def run(
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size, scale
):
    """Computes linear attention by the Triton kernels, for arguments normalised by `api.py`.
    Returns o (B, T, H, V) and the final state (B, H, K, V)."""
    form = _form_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, chunk_size=chunk_size)
    g_BTHK = recurrences.with_resets(log_decay_BTHK, segment_ids_BT, v_BTHV)
    return _run((form, scale), None, q_BTGK, k_BTGK, v_BTHV, g_BTHK, initial_state_BHKV)


def _forward(static, _, *arrays):
    form, scale = static

    @launch.over_batch
    def forward(arrays):
        q_BTGK, k_BTGK, v_BTHV, g_BTHK, start_BHKV = arrays
        scores = recurrences.scores(form, q_BTGK, k_BTGK, g_BTHK)
        states_BHNKV, final_BHKV = recurrences.states(form, k_BTGK, v_BTHV, g_BTHK, start_BHKV)
        inputs = q_BTGK, k_BTGK, v_BTHV, g_BTHK, states_BHNKV, scores
        return recurrences.outputs(form, *inputs, scale=scale), final_BHKV

    return forward(arrays), ()


def _backward(static, _, arrays, residuals, cotangents):
    form, scale = static

    @launch.over_batch
    def backward(arrays):
        (q_BTGK, k_BTGK, v_BTHV, g_BTHK, start_BHKV), (do_BTHV, dfinal_BHKV) = arrays
        scores = recurrences.scores(form, q_BTGK, k_BTGK, g_BTHK)
        states, _ = recurrences.states(form, k_BTGK, v_BTHV, g_BTHK, start_BHKV)
        dstates, dstart_BHKV = recurrences.states(
            form, q_BTGK, do_BTHV, g_BTHK, dfinal_BHKV, reverse=True, scale=scale
        )
        # dS' above; dv = scale A^T do + (k exp(g_reversed)) dS', then dq, dk and dg.
        dv_BTHV = recurrences.gradients_of_values(
            *(form, q_BTGK, k_BTGK, g_BTHK, do_BTHV, dstates, scores),
            scale=scale,
            dtype=v_BTHV.dtype,
        )
        dq_BTGK, dk_BTGK, dg_BTHK = recurrences.gradients_of_keys(
            form, q_BTGK, k_BTGK, v_BTHV, g_BTHK, do_BTHV, states, dstates, scale=scale
        )
        dq_BTGK, dk_BTGK = dq_BTGK.astype(q_BTGK.dtype), dk_BTGK.astype(k_BTGK.dtype)
        return dq_BTGK, dk_BTGK, dv_BTHV, dg_BTHK, dstart_BHKV

    return backward((arrays, cotangents))


def _plain(static, _, q_BTGK, k_BTGK, v_BTHV, g_BTHK, start_BHKV):
    form, scale = static
    arrays = q_BTGK, k_BTGK, v_BTHV, recurrences.every_head(form, g_BTHK), start_BHKV
    return chunked.run(*arrays, None, form.C, scale)


_run = kernel_vjp.differentiable(_forward, _backward, _plain)
