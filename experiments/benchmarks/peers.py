"""Other libraries as entries of the benchmark: what `gpu_peers` and `cpu_peers` share.

A peer is numpy in, its own arrays inside, the same names out, so that the correctness gate and the
clock are those of `experiments.bench`. Initial and final states take part.
"""

import dataclasses
import importlib.util
from collections.abc import Callable

import numpy as np

from experiments.benchmarks.entries import BenchmarkEntry, Prepared, Problem, jax_entry

OUTPUTS = ("output", "final state")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of another library's operator with ours.

    op, variant: our operator and its kind of call, such as a decay. package: the peer's Python
      package.
    call: inputs, in the peer's arrays -> (output, final state).
    limit: the most that our forward+backward may take, as a share of the peer's time.
    """

    name: str
    op: str
    variant: str
    package: str
    call: Callable
    limit: float


def torch_entry(comparison: Comparison, device: str, install: str) -> BenchmarkEntry:
    """Returns the benchmark entry of a torch peer on `device`. install: how to get the peer."""

    def prepare(problem: Problem, backward: bool) -> Prepared:
        _installed(comparison, install)
        import torch

        def tensor(x):
            narrow = x.dtype not in (np.float32, np.float64)
            x = torch.from_numpy(np.array(x, np.float32)).to(device)
            return x.to(torch.bfloat16) if narrow else x

        inputs = {name: tensor(x).requires_grad_(backward) for name, x in problem.inputs.items()}
        cotangents = {name: tensor(x) for name, x in problem.cotangents.items()}

        def run():
            outputs = dict(zip(OUTPUTS, comparison.call(inputs)))
            results = dict(outputs)
            if backward:
                given = [cotangents[name].to(x.dtype) for name, x in outputs.items()]
                gradients = torch.autograd.grad(
                    list(outputs.values()), list(inputs.values()), given, allow_unused=True
                )
                results |= {f"gradient of {n}": g for n, g in zip(inputs, gradients)}
            if device == "cuda":
                torch.cuda.synchronize()
            return _Tensors(results)

        return Prepared(run)

    return BenchmarkEntry(comparison.package, prepare)


def jax_peer_entry(comparison: Comparison, install: str) -> BenchmarkEntry:
    """Returns the benchmark entry of a JAX peer, compiled as ours. install: how to get the peer."""

    def prepare(problem: Problem, backward: bool) -> Prepared:
        _installed(comparison, install)
        entry = jax_entry(comparison.package, lambda x: dict(zip(OUTPUTS, comparison.call(x))))
        return entry.prepare(problem, backward)

    return BenchmarkEntry(comparison.package, prepare)


def _installed(comparison: Comparison, install: str):
    if importlib.util.find_spec(comparison.package) is None:
        raise NotImplementedError(f"{comparison.package} is not installed: {install}")


class _Tensors(dict):
    """Dict of torch results whose `items`, outside the timed region, gives float32 NumPy arrays."""

    def items(self):
        for name, x in super().items():
            yield name, np.float32(np.nan) if x is None else x.detach().float().cpu().numpy()
