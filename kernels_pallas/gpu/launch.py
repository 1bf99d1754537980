"""Launches Triton kernels from JAX: on a GPU through jax_triton, on a CPU through Triton's
interpreter.

A kernel takes pointers, inputs before outputs, then constants by name; every size is a constant.
Triton is imported inside functions: none of this is needed where no kernel runs.

Under `devices.interpreted()` on a CPU a launch is a `jax.pure_callback` that runs the same kernel
through Triton's interpreter, program by program, so that an operator's whole composition, its
custom VJP included, runs as it would on a GPU. Outputs start as NaN there, so that an element that
no program writes is seen. Whether a kernel is interpreted is decided when it is decorated, hence
once per process: `prepare`.
"""

import contextlib
import contextvars
import functools
import importlib.util
import os
import sys
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.dispatch import devices, manual_axes, tuning

EXTRA = "pip install -e '.[triton]'"
LARGEST_GRID = 65535  # CUDA's, in all dimensions but the first
# Bytes of shared memory that a program may ask for, by compute capability (CUDA guide); the others
# of sm_80 and later have 99 KiB. For a GPU that is not in this machine, those of sm_80.
SHARED = {8.0: 166912, 8.7: 166912, 9.0: 232448, 10.0: 232448, 10.3: 232448}
TILES = {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2}
_RECORD: contextvars.ContextVar[list | None] = contextvars.ContextVar("record", default=None)
_INTERPRETER = threading.Lock()  # one grid at a time: the interpreter's builder is global


class KernelLaunch(NamedTuple):
    """Fields of one launch of a Triton kernel: array shapes, grid, and compile-time constants."""

    kernel: Any
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]


@contextlib.contextmanager
def recorded():
    """Context manager: collects the Triton launches traced inside in a list, and runs none. Yields
    the list of KernelLaunch; each launch returns zeros."""
    launches = []
    token = _RECORD.set(launches)
    try:
        yield launches
    finally:
        _RECORD.reset(token)


def unsupported_reason() -> str | None:
    """Returns None if Triton kernels can run in this process, else the reason."""
    runs = not devices.interpreting() and _RECORD.get() is None
    needed = ("triton", "jax_triton") if runs else ("triton",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} cannot be imported; install the extra: {EXTRA}"
    return None


def shared_limit() -> int:
    """Returns the bytes of shared memory that a program may use on the device traced for."""
    capability = devices.compute_capability()
    return SHARED[8.0] if capability is None else SHARED.get(capability, 99 << 10)


def prepare() -> None:
    """Sets what Triton reads when it decorates kernels; call it before importing their module.

    Raises:
      RuntimeError: kernels are to be interpreted, but Triton was already imported for compiling.
    """
    if devices.interpreting():
        if "triton" not in sys.modules:
            os.environ.setdefault("TRITON_INTERPRET", "1")
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "Triton kernels cannot be interpreted: triton was imported in this process for "
                "compiling; set TRITON_INTERPRET=1 before that import"
            )


def precision(name: str) -> str:
    """Returns the PRECISION argument of `blocks.dot` for the precision `name`, such as "bf16x2".
    Interpreted kernels get "<name> rounded": they round explicitly where a tensor core would."""
    return f"{name} rounded" if devices.interpreting() and name.startswith("bf16") else name


def run(kernel, inputs, outputs, grid, *, num_warps=4, num_stages=2, **constants):
    """Runs a Triton kernel over its grid and returns a list of arrays.

    outputs: shapes and dtypes of the results. constants: the kernel's compile-time arguments.

    Raises:
      ImportError: jax_triton is missing or unusable on this machine; the message names the extra.
    """
    if (record := _RECORD.get()) is not None:
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs)
        sizes = num_warps, num_stages
        record.append(KernelLaunch(kernel, shapes, tuple(outputs), grid, *sizes, constants))
        return [jnp.zeros(x.shape, x.dtype) for x in outputs]
    if devices.interpreting():
        run = functools.partial(_interpret, kernel, outputs, grid, constants)
        results = jax.pure_callback(run, outputs, *inputs)
        return manual_axes.alike(results, manual_axes.varying(inputs))
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]  # raises on a host without a GPU, in some versions
    except ImportError as error:
        raise ImportError(
            f"jax_triton cannot be imported ({error}); on a GPU machine: {EXTRA}"
        ) from error
    # jax_triton 0.4 calls out_shape out_type.
    renamed = tuple(int(n) for n in jax_triton.__version__.split(".")[:2]) >= (0, 4)
    keywords = {"out_type" if renamed else "out_shape": outputs}
    results = jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        **keywords,
        **constants,
    )
    return manual_axes.alike(results, manual_axes.varying(inputs))


class _Tensor:
    """Adapter that gives a numpy array the torch methods that Triton's interpreter calls."""

    def __init__(self, array):
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self):
        return self.array.ctypes.data

    def itself(self, *args, **keywords):
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = itself

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


def _interpret(kernel, outputs, grid, constants, *inputs):
    arrays = [np.ascontiguousarray(x) for x in inputs]
    # bfloat16 is rounded here: the interpreter would cut it off.
    results = [np.full(x.shape, np.nan, np.promote_types(x.dtype, np.float32)) for x in outputs]
    with _INTERPRETER, np.errstate(all="ignore"):
        kernel[grid](*(_Tensor(x) for x in (*arrays, *results)), **constants)
    return [result.astype(x.dtype) for result, x in zip(results, outputs)]


def over_batch(function):
    """Decorator: gives a function of arrays with batch axis 0 a batching rule, for `jax.vmap`.

    The new axis is merged into the batch, since a kernel launch has no batching rule. The function
    takes one pytree of arrays; its outputs have the batch first, too.
    """

    @jax.custom_batching.custom_vmap
    def call(arrays):
        return function(arrays)

    @call.def_vmap
    def rule(axis_size, in_batched, arrays):
        def join(x, batched):
            if not batched:
                x = jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        outputs = call(jax.tree.map(join, arrays, in_batched[0]))
        apart = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), outputs)
        return apart, jax.tree.map(lambda x: True, outputs)

    return call


def tiles(operator: str, kernel: str, dtype: str, K: int, V: int) -> dict:
    """Returns the block sizes, warps and stages of the Triton kernel named `kernel`, as a dict.

    They are `tuned.json`'s entry for operator/triton/kernel/dtype/KxV, or else `TILES`. BK and BV
    are at most K and V, all rounded up to powers of 2.
    """
    K, V = power_of_two(K), power_of_two(V)
    chosen = tuning.lookup(TILES, operator, "triton", kernel, dtype, f"{K}x{V}")
    return chosen | {"BK": min(chosen["BK"], K), "BV": min(chosen["BV"], V)}


def power_of_two(n: int) -> int:
    """Rounds n up to a power of two of at least 16, the least that a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())
