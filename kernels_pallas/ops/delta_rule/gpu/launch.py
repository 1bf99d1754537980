"""The delta rule as Triton kernels, forward and backward, for all four decays (sm80 and later).

Forward: each chunk's inverse (I + A)^-1, all at once; then U and the states, sequential in chunks;
then linear attention's outputs with U for values. Backward: the same again, the states' cotangents
in reverse, and linear attention's gradients twice, for what queries and for what keys read. The
residuals are the inputs alone.

float32 without a decay or with one per token, which may be 0, carries states, inverses and U in
float64 from chunk to chunk: a transition that is a reflection forgets no error (docs/math/
delta_rule.md, "Compensated products"), and data-centre GPUs multiply float64 as fast as IEEE
float32. With a decay per channel the scores of keys with keys are float32, and so is the rest:
where such decays are 0, errors grow. What is computed from bfloat16 inputs multiplies as two
bfloat16 terms, and without a decay, for the same reason, as three.
"""

import jax.numpy as jnp

from kernels_pallas.common import kernel_vjp
from kernels_pallas.gpu import launch, recurrences
from kernels_pallas.ops.delta_rule import chunked

CHUNK_SIZE = {"bfloat16": 64, "float32": 32}
# Words of shared memory per token of a chunk, (times K, and beside), of the kernels that hold all
# of K, by dtype and whether decay is per channel: as compiled for sm_80, sm_90 and sm_100 with the
# tiles of `tuned.json`.
SHARED_WORDS = {
    ("bfloat16", False): (2, 60),
    ("bfloat16", True): (4, 81),
    ("float32", False): (2, 228),
    ("float32", True): (5, 97),
}


def unsupported_reason(
    *, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, chunk_size, **others
):
    """Returns None if the Triton kernels can run this call, else the reason."""
    if chunk_size is not None and chunk_size > 64:
        return f"chunk_size goes to 64; got {chunk_size}"
    if reason := recurrences.unsupported_reason(q_BTGK, v_BTHV, initial_state_BHKV, chunk_size):
        return reason
    form = _form_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, chunk_size)
    return recurrences.too_long(form.K, form.C, _words(form))


def _form_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, chunk_size):
    """Returns the sizes and precision of a call. chunk_size: tokens per chunk; None is the longest
    of up to `CHUNK_SIZE` that fits shared memory."""
    arrays = q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK
    form = recurrences.TritonForm.of("delta_rule", *arrays, chunk_size, 64)
    if chunk_size is None:
        usual = min(CHUNK_SIZE[form.dtype], form.C)
        form = form._replace(C=recurrences.fitting_chunk(usual, _words(form)))
    return form


def _words(form) -> int:
    times_K, beside = SHARED_WORDS[form.dtype, form.per_channel]
    return times_K * launch.power_of_two(form.K) + beside


def run(
    q_BTGK, k_BTGK, v_BTHV, beta_BTH, log_decay_BTHK, initial_state_BHKV, segment_ids_BT,
    chunk_size, scale,
):  # fmt: skip
    """Computes the delta rule by the Triton kernels, for arguments normalised by `api.py`. Returns
    o (B, T, H, V) and the final state (B, H, K, V)."""
    arrays = q_BTGK, k_BTGK, v_BTHV
    form = _form_of(*arrays, log_decay_BTHK, chunk_size)
    exact = not form.per_channel and form.dtype == "float32"
    mixed = form.mixed
    if log_decay_BTHK is None and mixed == "bf16x2":
        mixed = "bf16x3"
    form = form._replace(inputs=mixed, mixed=mixed)
    g_BTHK = recurrences.with_resets(log_decay_BTHK, segment_ids_BT, v_BTHV)
    beta_BTH = beta_BTH.astype(jnp.float32)
    return _run((form, exact, scale), None, *arrays, beta_BTH, g_BTHK, initial_state_BHKV)


def _forward(static, _, *arrays):
    form, exact, scale = static

    @launch.over_batch
    def forward(arrays):
        q_BTGK, k_BTGK, v_BTHV, _, g_BTHK, _ = arrays
        _, _, u_BTHV, states_BHNKV, final_BHKV = _writes(form, exact, *arrays[1:])
        scores = recurrences.scores(form, q_BTGK, k_BTGK, g_BTHK)
        inputs = q_BTGK, k_BTGK, u_BTHV, g_BTHK, states_BHNKV, scores
        return recurrences.outputs(form, *inputs, scale=scale, dtype=v_BTHV.dtype), final_BHKV

    return forward(arrays), ()


def _backward(static, _, arrays, residuals, cotangents):
    form, exact, scale = static

    @launch.over_batch
    def backward(arrays):
        (q_BTGK, k_BTGK, v_BTHV, beta_BTH, g_BTHK, _), (do_BTHV, dfinal_BHKV) = arrays
        kk, X, u_BTHV, states, _ = _writes(form, exact, *arrays[0][1:])
        scores = recurrences.scores(form, q_BTGK, k_BTGK, g_BTHK)
        # dU = scale Z^T do of every chunk, then dR and dS' chunk by chunk, in reverse.
        du_BTHV = recurrences.gradients_of_values(
            form, q_BTGK, k_BTGK, g_BTHK, do_BTHV, None, scores, scale=scale
        )
        dr_BTHV, dstates, dstart_BHKV = recurrences.run_kernel(
            form,
            _kernels().gradients_of_writes,
            (q_BTGK, k_BTGK, beta_BTH, g_BTHK, X, do_BTHV, du_BTHV, dfinal_BHKV),
            [(u_BTHV.shape[1:], jnp.float32), *_states_of(form)],
            ("V",),
            whole_K=True,
            SCALE=scale,
            EXACT=exact,
            MIXED=_precision(form, exact),
        )
        # What queries read: linear attention of q, k and U.
        dq_BTGK, dk_BTGK, dg_BTHK = recurrences.gradients_of_keys(
            form, q_BTGK, k_BTGK, u_BTHV, g_BTHK, do_BTHV, states, dstates, scale=scale
        )
        # What keys read, v - R / beta: an output with q = k whose cotangent is -beta dR.
        dread_BTHV = -beta_BTH[..., None] * dr_BTHV
        rows, columns, dg_read_BTHK = recurrences.gradients_of_keys(
            *(form, k_BTGK, k_BTGK, u_BTHV, g_BTHK, dread_BTHV, states, None),
            scale=1.0,
            strict=True,
        )
        read_BTHV = recurrences.outputs(
            *(form, k_BTGK, k_BTGK, u_BTHV, g_BTHK, states, kk),
            scale=1.0,
            strict=True,
            dtype=jnp.float32,
        )
        # R = beta (v - read), so dbeta = dR . (v - read) and dv = beta dR.
        dbeta_BTH = jnp.sum(dr_BTHV * (v_BTHV.astype(jnp.float32) - read_BTHV), axis=-1)
        dk_BTGK = (dk_BTGK + rows + columns).astype(k_BTGK.dtype)
        dv_BTHV = (-dread_BTHV).astype(v_BTHV.dtype)
        dq_BTGK = dq_BTGK.astype(q_BTGK.dtype)
        return dq_BTGK, dk_BTGK, dv_BTHV, dbeta_BTH, dg_BTHK + dg_read_BTHK, dstart_BHKV

    return backward((arrays, cotangents))


def _plain(static, _, q_BTGK, k_BTGK, v_BTHV, beta_BTH, g_BTHK, start_BHKV):
    form, _, scale = static
    arrays = q_BTGK, k_BTGK, v_BTHV, beta_BTH, recurrences.every_head(form, g_BTHK), start_BHKV
    return chunked.run(*arrays, None, scale=scale)


_run = kernel_vjp.differentiable(_forward, _backward, _plain)


def _kernels():
    launch.prepare()
    from kernels_pallas.ops.delta_rule.gpu import kernels

    return kernels


def _precision(form, exact):
    """Returns the precision of products that carry a state from chunk to chunk."""
    return "fp64" if exact else launch.precision(form.mixed)


def _states_of(form):
    """Returns (shape after B, dtype) of the states at chunk boundaries, and of the final state."""
    shape = form.K, form.V
    return ((form.H, form.N, *shape), jnp.float32), ((form.H, *shape), jnp.float32)


def _writes(form, exact, k_BTGK, v_BTHV, beta_BTH, g_BTHK, start_BHKV):
    """Computes U, what the tokens write to the state, and returns it with all it was computed from.

    These are the decayed scores of keys with keys (None unless decay is per channel), the inverses
    of I + A per chunk, U (B, T, H, V), the states that enter the chunks, and the final state.
    """
    kk = recurrences.scores(form, k_BTGK, k_BTGK, g_BTHK, strict=True)
    parts = (2,) if exact else ()  # float64 as two float32 terms
    (X_BHNCC,) = recurrences.run_kernel(
        form,
        _kernels().inverses,
        (k_BTGK, beta_BTH, g_BTHK, beta_BTH if kk is None else kk),
        [((form.H, form.N, *parts, form.C, form.C), jnp.float32)],
        ("N",),
        LEVELS=(form.C // 16).bit_length() - 1,
        EXACT=exact,
        MIXED=_precision(form, exact),
        SUMS="fp64" if exact else form.sums,
    )
    u_BTHV, states_BHNKV, final_BHKV = recurrences.run_kernel(
        form,
        _kernels().writes,
        (k_BTGK, v_BTHV, beta_BTH, g_BTHK, X_BHNCC, start_BHKV),
        [((form.T, form.H, form.V), jnp.float32), *_states_of(form)],
        ("V",),
        whole_K=True,
        EXACT=exact,
        MIXED=_precision(form, exact),
    )
    return kk, X_BHNCC, u_BTHV, states_BHNKV, final_BHKV
