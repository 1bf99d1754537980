"""Checks of operators' arguments, and their conversion to what every implementation takes.

After it the heads of q and k divide those of v, log_decay is None or finite and (B, T, H, K or 1),
and the initial state is an array in float32 or wider.
"""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import checks, decay, dtypes


def check_qkv(operator: str, q_BTGK, k_BTGK, v_BTHV) -> None:
    """Raises ValueError unless q, k and v are floating arrays whose shapes fit each other."""
    for name, array in (("q", q_BTGK), ("k", k_BTGK), ("v", v_BTHV)):
        check_float(operator, name, array)
    shapes = f"q {q_BTGK.shape}, k {k_BTGK.shape}, v {v_BTHV.shape}"
    if not q_BTGK.ndim == k_BTGK.ndim == v_BTHV.ndim == 4:
        raise ValueError(f"{operator}: q, k and v must be (B, T, heads, dim); got {shapes}")
    if not q_BTGK.shape[:2] == k_BTGK.shape[:2] == v_BTHV.shape[:2]:
        raise ValueError(f"{operator}: q, k and v must share batch and time; got {shapes}")
    if q_BTGK.shape[3] != k_BTGK.shape[3]:
        raise ValueError(f"{operator}: q and k must share their last dimension K; got {shapes}")
    if q_BTGK.shape[2] != k_BTGK.shape[2] or not divides(k_BTGK.shape[2], v_BTHV.shape[2]):
        raise ValueError(
            f"{operator}: q and k must have the same number of heads G, and G must divide v's heads H; got {shapes}"
        )


def divides(groups: int, heads: int) -> bool:
    """Returns whether `groups` divides `heads`; 0 groups divide 0 heads only."""
    return heads % groups == 0 if groups else heads == 0


def check_array(operator: str, name: str, array) -> None:
    """Raises ValueError unless `array` is a JAX or NumPy array, or a `jax.ShapeDtypeStruct`."""
    if not isinstance(array, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        given = "None" if array is None else f"{array!r:.60} ({type(array).__name__})"
        raise ValueError(
            f"{operator}: {name} is {given}; expected an array: make one by jax.numpy.asarray"
        )


def check_float(operator: str, name: str, array) -> None:
    """Raises ValueError unless `array` is an array of real floating-point numbers."""
    check_array(operator, name, array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{operator}: {name} has dtype {array.dtype}; expected a floating dtype (float32, bfloat16, ...)"
        )


def check_segment_ids(operator: str, segment_ids, x_BTX) -> None:
    """Raises ValueError unless segment ids are None, or integers (B, T) with the sizes of x_BTX."""
    if segment_ids is None:
        return
    check_shape(operator, "segment_ids", segment_ids, x_BTX.shape[:2])
    check_integers(operator, "segment_ids", segment_ids)


def check_integers(operator: str, name: str, array) -> None:
    """Raises ValueError unless `array` is an array of integers."""
    check_array(operator, name, array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{operator}: {name} has dtype {array.dtype}; expected integers")


def check_scale(operator: str, scale) -> None:
    """Raises ValueError unless `scale` is None or a number, not an array: it is compiled in."""
    if scale is not None and not is_number(scale):
        raise ValueError(
            f"{operator}: scale is {scale!r}; expected a number or None (multiply q by one that is learned)"
        )


def check_number_or_scalar(operator: str, name: str, value) -> None:
    """Raises ValueError unless `value` is a number or a floating array of shape ()."""
    if is_number(value):
        return
    scalar = isinstance(value, jax.Array | np.ndarray) and value.shape == ()
    if not scalar or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{operator}: {name} is {value!r:.60}; expected a number, or a floating array of shape ()"
        )


def check_positive(operator: str, name: str, value) -> None:
    """Raises ValueError unless `value` is None or a number above 0."""
    if value is not None and not (is_number(value) and value > 0):
        raise ValueError(
            f"{operator}: {name} is {value!r:.60}; expected a positive number, or None"
        )


def is_number(value) -> bool:
    """Returns whether `value` is a real Python or NumPy number, not an array or a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(operator: str, name: str, value, what: str = "an integer of at least 1, or None"):
    """Raises ValueError, which expects `what`, unless `value` is None or a positive integer."""
    if value is not None and not (is_count(value) and value >= 1):
        raise ValueError(f"{operator}: {name} is {value!r:.60}; expected {what}")


def is_count(value) -> bool:
    """Returns whether `value` is a Python or NumPy integer, not an array or a boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_flag(operator: str, name: str, value) -> None:
    """Raises ValueError unless `value` is True or False, not an array: it is compiled in."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{operator}: {name} is {value!r:.60}; expected True or False")


def check_chunk_size(operator: str, chunk_size) -> None:
    """Raises ValueError unless `chunk_size` is None or a power of two of at least 16."""
    if chunk_size is None:
        return
    if not is_count(chunk_size) or chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(
            f"{operator}: chunk_size is {chunk_size!r}; expected a power of two, 16 or more (or None)"
        )


def check_shape(operator: str, name: str, array, *expected: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` is an array that has one of the `expected` shapes."""
    check_array(operator, name, array)
    if array.shape not in expected:
        choices = " or ".join(str(shape) for shape in expected)
        raise ValueError(f"{operator}: {name} has shape {array.shape}; expected {choices}")


def recurrence(
    operator: str, q_BTGK, k_BTGK, v_BTHV, log_decay, initial_state, segment_ids, chunk_size,
    *, state_as_wide_as_all: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Checks what every matrix recurrence takes, and returns it by the names of implementations.

    state_as_wide_as_all: whether the dtypes of k and log_decay widen the state, as q's and v's do.
    """
    check_qkv(operator, q_BTGK, k_BTGK, v_BTHV)
    check_segment_ids(operator, segment_ids, v_BTHV)
    check_chunk_size(operator, chunk_size)
    log_decay_BTHK = normal_log_decay(operator, log_decay, q_BTGK, v_BTHV)
    others = (k_BTGK, log_decay_BTHK) if state_as_wide_as_all else ()
    state_BHKV = normal_initial_state(operator, initial_state, q_BTGK, v_BTHV, *others)
    return {
        "q_BTGK": q_BTGK,
        "k_BTGK": k_BTGK,
        "v_BTHV": v_BTHV,
        "log_decay_BTHK": log_decay_BTHK,
        "initial_state_BHKV": state_BHKV,
        "segment_ids_BT": segment_ids,
        "chunk_size": chunk_size,
    }


def normal_log_decay(operator: str, log_decay, q_BTGK, v_BTHV):
    """Returns a log decay as None or (B, T, H, K or 1), in float32 or wider.

    log_decay: None, (H,), (B, T, H) or (B, T, H, K). Only a log decay per channel keeps K; the
      others get a last axis of 1.

    Entries below `decay.RESET`, -inf included, become RESET. Results and gradients stay the same,
    as the exponential of such an entry is 0 already. Raises ValueError for a wrong shape or dtype
    and, with `checks` on, for a positive entry.
    """
    if log_decay is None:
        return None
    B, T, H, _ = v_BTHV.shape
    check_shape(operator, "log_decay", log_decay, (H,), (B, T, H), (B, T, H, q_BTGK.shape[3]))
    check_float(operator, "log_decay", log_decay)
    checks.not_positive(operator, "log_decay", log_decay)
    log_decay = log_decay.astype(state_dtype(log_decay))
    log_decay = jnp.where(log_decay < decay.RESET, decay.RESET, log_decay)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay[None, None], (B, T, H))
    return log_decay if log_decay.ndim == 4 else log_decay[..., None]


def normal_initial_state(operator: str, initial_state, q_BTGK, v_BTHV, *others) -> jax.Array:
    """Returns the initial state (B, H, K, V), zeros for None, in float32 or wider.

    q_BTGK, v_BTHV: give the sizes. The result is float64 where one of them or of `others`
      (arrays or None) is.
    """
    B, _, H, V = v_BTHV.shape
    shape_BHKV = (B, H, q_BTGK.shape[3], V)
    dtype = state_dtype(q_BTGK, v_BTHV, *(x for x in others if x is not None))
    if initial_state is None:
        return jnp.zeros_like(v_BTHV, dtype, shape_BHKV)
    check_shape(operator, "initial_state", initial_state, shape_BHKV)
    check_float(operator, "initial_state", initial_state)
    return initial_state.astype(dtypes.common(initial_state.dtype, dtype))


def state_dtype(*arrays) -> jnp.dtype:
    """Returns the dtype of states, gates and their sums: float32, or float64 where an array is."""
    return dtypes.common(*(array.dtype for array in arrays), jnp.float32)


def not_one_token(*, v_BTHV, **others) -> str | None:
    """Returns None if a call has one token, so that one step serves it, else the reason."""
    T = v_BTHV.shape[1]
    return None if T == 1 else f"it takes one token; got T = {T}"


def one_token(operator: str, **arrays) -> list:
    """Returns the arrays (B, heads, ...) of one token with a time axis: (B, 1, heads, ...)."""
    for name, array in arrays.items():
        check_array(operator, name, array)
        if array.ndim < 2:
            raise ValueError(
                f"{operator}: {name} has shape {array.shape}; expected a batch and heads in front"
            )
    return [array[:, None] for array in arrays.values()]


def step(function: Callable, operator: str, log_decay, scale, state, **arrays):
    """Returns one token's log decay (B, H, ...) as (B, 1, H, ...); None and (H,) stay as is."""
    inputs_BTHK = one_token(operator, **arrays)
    if log_decay is not None:
        check_array(operator, "log_decay", log_decay)
        log_decay = log_decay if log_decay.ndim < 2 else log_decay[:, None]
    o_BTHV, state_BHKV = function(
        *inputs_BTHK, log_decay=log_decay, scale=scale, initial_state=state
    )
    return o_BTHV[:, 0], state_BHKV


def nothing(*arrays) -> bool:
    """Returns whether an array is empty: an operator then returns zeros and writes no state."""
    return any(0 in x.shape for x in arrays)


def repeat_heads(x_BTGK: jax.Array, heads: int) -> jax.Array:
    """Repeats key head g for value heads g*H/G ... (g+1)*H/G - 1: (B, T, G, K) to (B, T, H, K)."""
    copies = heads // x_BTGK.shape[2]
    return x_BTGK if copies == 1 else jnp.repeat(x_BTGK, copies, axis=2)
