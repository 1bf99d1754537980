"""The real diagonal recurrence as Triton kernels, forward and backward (sm80 and later).

The equations are those of docs/math/diagonal_scan.md, in two levels: the maps of all chunks at
once; the states that enter them, one after the other; every state, all chunks at once. Decays above
1 are right as long as those of one chunk multiply to a float32. A document's start is a decay of 0,
which lets pass what is not finite. The backward pass is the same in the other direction. The
residuals are the inputs and the states that enter the chunks, from which h is computed again in
float32: the one that the call returned may be rounded.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.common import kernel_vjp
from kernels_pallas.dispatch import tuning
from kernels_pallas.gpu import launch
from kernels_pallas.ops.diagonal_scan import chunked

TILES = {"C": 64, "BD": 128, "num_warps": 4, "num_stages": 2}


def unsupported_reason(x_BTD, decay_BTD, initial_state_BD, reverse=False) -> str | None:
    """Returns None if the Triton kernels can run this call, else the reason."""
    for name, array in (("x", x_BTD), ("decay", decay_BTD), ("initial_state", initial_state_BD)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {array.dtype}; it takes float32 and bfloat16 ('chunked' takes all)"
    if x_BTD.shape[0] > launch.LARGEST_GRID:
        return (
            f"B goes to {launch.LARGEST_GRID}; got {x_BTD.shape[0]} "
            "(split the batch, or take 'chunked')"
        )
    return launch.unsupported_reason()


def run(x_BTD, decay_BTD, initial_state_BD, reverse=False):
    """Computes h_t = decay_t * h_{t-1} + x_t by the Triton kernels; returns h and the final state.
    Arguments are normalised by `api.py`. reverse: whether h_t comes from h_{t+1} instead."""
    h_BTD, final_BD = _scan(
        reverse,
        None,
        x_BTD,
        decay_BTD.astype(jnp.float32),
        initial_state_BD.astype(jnp.float32),
    )
    return h_BTD, final_BD.astype(initial_state_BD.dtype)


def _forward(reverse, _, *arrays):
    @launch.over_batch
    def forward(arrays):
        x_BTD, decay_BTD, initial_BD = arrays
        entering_BND, final_BD = _entering(x_BTD, decay_BTD, initial_BD, reverse)
        h_BTD = _states(x_BTD, decay_BTD, entering_BND, reverse, x_BTD.dtype)
        return h_BTD, final_BD, entering_BND

    h_BTD, final_BD, entering_BND = forward(arrays)
    return (h_BTD, final_BD), entering_BND


def _backward(reverse, _, arrays, entering_BND, cotangents):
    @launch.over_batch
    def backward(arrays):
        (x_BTD, decay_BTD, initial_BD), entering_BND, (g_BTD, g_final_BD) = arrays
        # h again, the carries that enter each chunk from behind, then dx and da.
        h_BTD = _states(x_BTD, decay_BTD, entering_BND, reverse, jnp.float32)
        carry_BND, d_initial_BD = _entering(g_BTD, decay_BTD, g_final_BD, not reverse, adjoint=True)
        dx_BTD, ddecay_BTD = _launch(
            _kernels().gradients,
            (g_BTD, decay_BTD, h_BTD, initial_BD, carry_BND),
            [(x_BTD.shape, x_BTD.dtype), (x_BTD.shape, jnp.float32)],
            REVERSE=reverse,
        )
        return dx_BTD, ddecay_BTD, d_initial_BD

    return backward((arrays, entering_BND, cotangents))


def _plain(reverse, _, x_BTD, decay_BTD, initial_BD):
    return chunked.run(x_BTD, decay_BTD, initial_BD, reverse=reverse)


_scan = kernel_vjp.differentiable(_forward, _backward, _plain)


def _entering(x_BTD, decay_BTD, initial_BD, reverse, adjoint=False):
    """Computes the states that enter the chunks (B, N, D), and the final state (B, D). adjoint: for
    the backward pass's h' = a (h + x) instead of h' = a h + x."""
    B, T, D = x_BTD.shape
    shape_BND = B, -(-T // _tiles(D)["C"]), D
    product_BND, local_BND = _launch(
        _kernels().maps,
        (x_BTD, decay_BTD),
        [(shape_BND, jnp.float32)] * 2,
        REVERSE=reverse,
        ADJOINT=adjoint,
    )
    return _launch(
        _kernels().carry,
        (product_BND, local_BND, initial_BD),
        [(shape_BND, jnp.float32), ((B, D), jnp.float32)],
        REVERSE=reverse,
    )


def _states(x_BTD, decay_BTD, entering_BND, reverse, dtype):
    inputs = x_BTD, decay_BTD, entering_BND
    (h_BTD,) = _launch(_kernels().scan, inputs, [(x_BTD.shape, dtype)], REVERSE=reverse)
    return h_BTD


def _tiles(D):
    """Returns chunk length, channels per program, warps and stages, from `tuned.json` or `TILES`.
    All kernels take the same, as they exchange data per chunk."""
    tiles = tuning.lookup(TILES, "diagonal_scan", "triton", str(D))
    return tiles | {"BD": min(tiles["BD"], launch.power_of_two(D))}


def _kernels():
    launch.prepare()
    from kernels_pallas.ops.diagonal_scan.gpu import kernels

    return kernels


def _launch(kernel, inputs, outputs, **constants):
    B, T, D = inputs[0].shape
    tiles = _tiles(D)
    steps = 1 if kernel is _kernels().carry else -(-T // tiles["C"])
    outputs = [jax.ShapeDtypeStruct(*output) for output in outputs]
    grid = steps * -(-D // tiles["BD"]), B
    return launch.run(kernel, inputs, outputs, grid, T=T, D=D, **tiles, **constants)
