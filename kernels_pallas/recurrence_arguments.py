"""What the two matrix recurrences ask of their arguments, checked once and brought to one form.

Every implementation then sees: q scaled and float, heads of q and k dividing those of v, log_decay of rank 4 or
None, and a float32 (or wider) initial state.
"""

import numbers

import jax
import jax.numpy as jnp

from kernels_pallas import checks, dtypes


def check_qkv(operator: str, q_BTGK, k_BTGK, v_BTHV) -> None:
    """Raises ValueError where q, k and v do not fit each other, in shape or in kind."""
    shapes = f"q {q_BTGK.shape}, k {k_BTGK.shape}, v {v_BTHV.shape}"
    if not q_BTGK.ndim == k_BTGK.ndim == v_BTHV.ndim == 4:
        raise ValueError(f"{operator}: q, k and v must be (B, T, heads, dim); got {shapes}")
    if not q_BTGK.shape[:2] == k_BTGK.shape[:2] == v_BTHV.shape[:2]:
        raise ValueError(f"{operator}: q, k and v must share batch and time; got {shapes}")
    if q_BTGK.shape[3] != k_BTGK.shape[3]:
        raise ValueError(f"{operator}: q and k must share their last dimension K; got {shapes}")
    if 0 in (*q_BTGK.shape, *v_BTHV.shape):
        raise ValueError(f"{operator}: every dimension must be at least 1; got {shapes}")
    if q_BTGK.shape[2] != k_BTGK.shape[2] or v_BTHV.shape[2] % k_BTGK.shape[2]:
        raise ValueError(
            f"{operator}: q and k must have the same number of heads G, and G must divide v's heads H; got {shapes}"
        )
    for name, array in (("q", q_BTGK), ("k", k_BTGK), ("v", v_BTHV)):
        check_float(operator, name, array)


def check_float(operator: str, name: str, array) -> None:
    """Raises ValueError where `array` is not real floating point."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{operator}: {name} has dtype {array.dtype}; expected a floating dtype (float32, bfloat16, ...)"
        )


def check_segment_ids(operator: str, segment_ids, x_BTX) -> None:
    """Raises ValueError where segment ids are given and are not integers of shape (B, T)."""
    if segment_ids is None:
        return
    check_shape(operator, "segment_ids", segment_ids, x_BTX.shape[:2])
    check_integers(operator, "segment_ids", segment_ids)


def check_integers(operator: str, name: str, array) -> None:
    """Raises ValueError where `array` is not of integers."""
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{operator}: {name} has dtype {array.dtype}; expected integers")


def check_scale(operator: str, scale) -> None:
    """Raises ValueError where a scale is given that is no number: what is compiled in cannot be an array."""
    if not isinstance(scale, numbers.Real | None):
        raise ValueError(
            f"{operator}: scale is {scale!r}; expected a number or None (multiply q by one that is learned)"
        )


def check_chunk_size(operator: str, chunk_size) -> None:
    """Raises ValueError where a chunk size is given and is not a power of two of at least 16."""
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(
            f"{operator}: chunk_size is {chunk_size!r}; expected a power of two, 16 or more (or None)"
        )


def check_shape(operator: str, name: str, array, *expected: tuple[int, ...]) -> None:
    """Raises ValueError where `array` has none of the `expected` shapes."""
    if array.shape not in expected:
        choices = " or ".join(str(shape) for shape in expected)
        raise ValueError(f"{operator}: {name} has shape {array.shape}; expected {choices}")


def normal_log_decay(operator: str, log_decay, q_BTGK, v_BTHV):
    """Brings log_decay, None or (H,) or (B,T,H) or (B,T,H,K), to None or (B,T,H,1) or (B,T,H,K) in float32 or wider."""
    if log_decay is None:
        return None
    B, T, H, _ = v_BTHV.shape
    check_shape(operator, "log_decay", log_decay, (H,), (B, T, H), (B, T, H, q_BTGK.shape[3]))
    check_float(operator, "log_decay", log_decay)
    checks.not_positive(operator, "log_decay", log_decay)
    log_decay = log_decay.astype(state_dtype(log_decay))
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay[None, None], (B, T, H))
    return log_decay if log_decay.ndim == 4 else log_decay[..., None]


def normal_initial_state(operator: str, initial_state, q_BTGK, v_BTHV, *others) -> jax.Array:
    """Zeros where there is no initial state; in float32, or wider where an input is: q, v or one of the others (or None)."""
    B, _, H, V = v_BTHV.shape
    shape_BHKV = (B, H, q_BTGK.shape[3], V)
    dtype = state_dtype(q_BTGK, v_BTHV, *(x for x in others if x is not None))
    if initial_state is None:
        return jnp.zeros_like(v_BTHV, dtype, shape_BHKV)
    check_shape(operator, "initial_state", initial_state, shape_BHKV)
    check_float(operator, "initial_state", initial_state)
    return initial_state.astype(dtypes.common(initial_state.dtype, dtype))


def state_dtype(*arrays) -> jnp.dtype:
    """float32, or float64 where an input is: what states, gates and their sums are held in."""
    return dtypes.common(*(array.dtype for array in arrays), jnp.float32)


def repeat_heads(x_BTGK: jax.Array, heads: int) -> jax.Array:
    """Key head g serves value heads g*H/G ... (g+1)*H/G - 1."""
    copies = heads // x_BTGK.shape[2]
    return x_BTGK if copies == 1 else jnp.repeat(x_BTGK, copies, axis=2)
