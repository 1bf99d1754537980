"""Softmax attention by JAX's own implementations: XLA, cuDNN on GPUs, splash attention on TPUs.

All need K == V: the narrower of keys and values is padded with zeros, which change no logits and no
outputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import dtypes, kernel_vjp
from kernels_pallas.dispatch import devices, manual_axes
from kernels_pallas.ops.softmax_attention import chunked


def _same_width(q_BTHK, k_BSGK, v_BSGV):
    K, V = k_BSGK.shape[-1], v_BSGV.shape[-1]

    def widen(z):
        return jnp.pad(z, ((0, 0), (0, 0), (0, 0), (0, max(K, V) - z.shape[-1])))

    return (q_BTHK, k_BSGK, v_BSGV) if K == V else (widen(q_BTHK), widen(k_BSGK), widen(v_BSGV))


def xla(q_BTHK, k_BSGK, v_BSGV, visibility, scale):
    """Calls `jax.nn.dot_product_attention`, which holds all logits; 0 where a query sees no key."""
    V, dtype = v_BSGV.shape[-1], q_BTHK.dtype
    seen_BTS = visibility.mask()
    qkv = _same_width(q_BTHK, k_BSGK, v_BSGV)
    if dtype == jnp.float16:  # the library asks for a product that XLA's CPU backend does not have
        qkv = (x.astype(jnp.float32) for x in qkv)
    with jax.numpy_dtype_promotion("standard"):
        o_BTHV = jax.nn.dot_product_attention(
            *qkv, mask=seen_BTS[:, None], scale=scale, implementation="xla"
        )[..., :V].astype(dtype)
    some_BT = jnp.any(seen_BTS, axis=-1)  # the library averages all keys where a row sees none
    return jnp.where(some_BT[:, :, None, None], o_BTHV, 0)


def _differentiable(attend):
    """Decorator: gives a library's attend(scale, visibility, q, k, v) derivatives of any order.

    The first derivative is the library's own, the others are the chunked form's.
    """

    @functools.partial(jax.jit, static_argnums=0)  # one array given twice is two inputs inside
    def with_vjp(scale, visibility, *qkv):
        return jax.vjp(functools.partial(attend, scale, visibility), *qkv)

    def forward(scale, visibility, *qkv):
        o_BTHV, vjp = with_vjp(scale, visibility, *qkv)
        return o_BTHV, jax.tree.leaves(vjp)

    def backward(scale, visibility, qkv, residuals, g_BTHV):
        _, vjp = jax.eval_shape(functools.partial(with_vjp, scale), visibility, *qkv)
        return jax.tree.unflatten(jax.tree.structure(vjp), residuals)(g_BTHV)

    def plain(scale, visibility, *qkv):
        q_BTHK, k_BSGK, v_BSGV = qkv
        return chunked.run(q_BTHK, k_BSGK, v_BSGV, visibility, scale)

    # No checkpoint name: the residuals hold copies of q, k and v
    return kernel_vjp.differentiable(forward, backward, plain, call=attend, save=False)


def cudnn(q_BTHK, k_BSGK, v_BSGV, visibility, scale):
    """Calls cuDNN's fused attention, in a call for which `cudnn_unsupported_reason` is None."""
    return _cudnn(scale, visibility, q_BTHK, k_BSGK, v_BSGV)


@_differentiable
def _cudnn(scale, visibility, q_BTHK, k_BSGK, v_BSGV):
    V = v_BSGV.shape[-1]
    window = visibility.window
    o_BTHV = jax.nn.dot_product_attention(
        *_same_width(q_BTHK, k_BSGK, v_BSGV),
        scale=scale,
        is_causal=visibility.causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return o_BTHV[..., :V]


def cudnn_unsupported_reason(*, q, v, visibility) -> str | None:
    """Returns None if cuDNN can run this call, else the reason."""
    K = max(q.shape[3], v.shape[3])
    kind = devices.current().kind
    if "NVIDIA" not in kind.upper():
        return f"cuDNN runs on NVIDIA GPUs; this is {kind}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16; q is {q.dtype}"
    if not visibility.by_index:
        return "cuDNN masks by index, and this call gives positions"
    if visibility.q_segment_BT is not None:
        return "cuDNN takes no segment ids of this kind"
    if visibility.window is not None and not visibility.causal:
        return "cuDNN takes a window with causal=True only"
    limit = 256 if (devices.compute_capability() or 0) >= 9.0 else 128
    if K % 8 or limit < K:
        return f"cuDNN takes head dims up to {limit} here in multiples of 8; this call needs {K}"
    return None


def splash(q_BTHK, k_BSGK, v_BSGV, visibility, scale):
    """Calls JAX's splash attention (Pallas, TPU), which skips fully masked blocks, for any T."""
    return _splash(scale, visibility, q_BTHK, k_BSGK, v_BSGV)


@_differentiable
def _splash(scale, visibility, q_BTHK, k_BSGK, v_BSGV):
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    T, H = q_BTHK.shape[1:3]
    V = v_BSGV.shape[-1]
    padding = ((0, 0), (0, -T % 128), (0, 0), (0, 0))
    dtype = q_BTHK.dtype
    scaled_BTHK = (q_BTHK.astype(dtypes.common(dtype, jnp.float32)) * scale).astype(dtype)
    q_BTHK, k_BSGK, v_BSGV = (jnp.pad(z, padding) for z in _same_width(scaled_BTHK, k_BSGK, v_BSGV))
    S = q_BTHK.shape[1]
    window = visibility.window
    if visibility.causal and window is None:
        mask = library.CausalMask((S, S))
    elif window is not None:
        mask = library.LocalMask((S, S), (window - 1, 0 if visibility.causal else window - 1), 0)
    else:
        mask = library.FullMask((S, S))
    block = next(size for size in (512, 256, 128) if S % size == 0)
    blocks: dict[str, Any] = {
        **{f"block_{name}": block for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv")},
        **{f"block_{name}": block for name in ("kv_dkv_compute", "q_dq", "kv_dq")},
    }
    kernel = library.make_splash_mha(
        library.MultiHeadMask([mask] * H),
        block_sizes=library.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        interpret=devices.interpreting(),
    )
    segment_BT = visibility.q_segment_BT
    if segment_BT is None and S > T and not visibility.causal:
        segment_BT = jnp.zeros((q_BTHK.shape[0], T), jnp.int32)
    o_BHTV: Any
    heads_first = (z.swapaxes(1, 2) for z in (q_BTHK, k_BSGK, v_BSGV))
    if segment_BT is None:
        o_BHTV = jax.vmap(kernel)(*heads_first)
    else:
        segment_BT = jnp.pad(segment_BT, ((0, 0), (0, S - T)), constant_values=-1)
        o_BHTV = jax.vmap(kernel)(*heads_first, library.SegmentIds(segment_BT, segment_BT))
    return o_BHTV.swapaxes(1, 2)[:, :T, :, :V].astype(dtype)


def splash_unsupported_reason(*, q, v, visibility) -> str | None:
    """Returns None if splash attention can run this call, else the reason."""
    if not visibility.aligned:
        return "splash attention masks by index: it takes no positions, and as many keys as queries"
    if manual_axes.varying((q, v, visibility)):
        return "splash attention cannot be traced under jax.shard_map's check_vma: pass check_vma=False"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash attention takes bfloat16 and float32; q is {q.dtype}"
    if visibility.kv_segment_BS is not visibility.q_segment_BT:
        return "splash attention takes one array of segment ids; this call gives the keys' own"
    return None
