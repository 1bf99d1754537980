"""Reverse derivatives of any order for functions computed by kernels or hand-written loops.

A forward and a backward pass written by hand give a first derivative, and have none themselves.
Where they are differentiated again, which is rare, a plain form of the same function that JAX can
differentiate stands in: its `jax.vjp` for the backward pass, and itself for the forward pass.
"""

from collections.abc import Callable

import jax

from kernels_pallas.common import remat


def differentiable(
    forward: Callable,
    backward: Callable,
    plain: Callable,
    *,
    call: Callable | None = None,
    save: bool = True,
):
    """Returns f(form, fixed, *arrays) -> outputs, with reverse derivatives of any order.

    f takes a hashable `form`, static under tracing, and `fixed`, a pytree of arrays without
    derivatives, such as document ids, or None.

    Args:
      forward: maps (form, fixed, *arrays) to (outputs, residuals); may run a kernel.
      backward: maps (form, fixed, arrays, residuals, cotangents of the outputs) to the cotangents
        of the arrays.
      plain: maps (form, fixed, *arrays) to the outputs of `forward`, in operations that JAX can
        differentiate; second and higher derivatives come from it.
      call: maps (form, fixed, *arrays) to outputs, for calls that nobody differentiates; None is
        `forward` without its residuals.
      save: whether outputs and residuals get the checkpoint name of operator residuals (`remat`).
    """

    def only_outputs(form, fixed, *arrays):
        return forward(form, fixed, *arrays)[0]

    run = jax.custom_vjp(call or only_outputs, nondiff_argnums=(0,))
    with_residuals = jax.custom_vjp(forward, nondiff_argnums=(0,))
    gradients = jax.custom_vjp(backward, nondiff_argnums=(0,))

    def run_forward(form, fixed, *arrays):
        outputs, residuals = with_residuals(form, fixed, *arrays)
        if save:
            outputs, residuals = remat.named((outputs, residuals))
        return outputs, (fixed, arrays, residuals)

    def run_backward(form, saved, cotangents):
        return None, *gradients(form, *saved, cotangents)

    def residuals_forward(form, fixed, *arrays):
        outputs, residuals = with_residuals(form, fixed, *arrays)
        return (outputs, residuals), (fixed, arrays, residuals)

    def residuals_backward(form, saved, cotangents):
        # `gradients`, which reads the residuals, passes no cotangent to them
        return run_backward(form, saved, cotangents[0])

    def gradients_forward(form, fixed, arrays, residuals, cotangents):
        return gradients(form, fixed, arrays, residuals, cotangents), (fixed, arrays, cotangents)

    def gradients_backward(form, saved, second):
        fixed, arrays, cotangents = saved

        def plain_gradients(arrays, cotangents):
            _, vjp = jax.vjp(lambda *arrays: plain(form, fixed, *arrays), *arrays)
            return vjp(cotangents)

        _, vjp = jax.vjp(plain_gradients, arrays, cotangents)
        d_arrays, d_cotangents = vjp(tuple(second))
        return None, d_arrays, None, d_cotangents

    run.defvjp(run_forward, run_backward)
    with_residuals.defvjp(residuals_forward, residuals_backward)
    gradients.defvjp(gradients_forward, gradients_backward)
    return run
