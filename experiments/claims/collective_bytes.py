"""Counts the bytes that compiled programs send between ranks, in a process of its own.

A process is told at its start how many CPU devices it has. As a program this file prints a JSON
list with an item per case of its argument, itself such a list: the bytes that each rank receives
from others, forward and backward.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import context_parallel
from kernels_pallas.tools import hlo

# Of each method: the operator, how its states or keys travel, and the arrays it takes. Not causal,
# Ring Attention needs no balancing among ranks; a causal one here also sends half of each shard.
_ring = functools.partial(context_parallel.softmax_attention, causal=False)
METHODS = {
    "LASP-1": (context_parallel.linear_attention, "ring", "qkvg"),
    "LASP-2": (context_parallel.linear_attention, "all_gather", "qkvg"),
    "ZeCO": (context_parallel.linear_attention, "all_scan", "qkvg"),
    "KCP": (context_parallel.delta_rule, "all_gather", "qkvb"),
    "Ring Attention": (_ring, "ring", "qkv"),
    "LASP-2H": (context_parallel.softmax_attention, "all_gather", "qkv"),
}


def measure(cases: list[dict]) -> list[dict]:
    """Returns each case with the bytes received, counted in a process with enough CPU devices.

    A case has a method, ranks W, tokens per rank L, heads H, key and value sizes K and V.
    """
    most = max(case["W"] for case in cases)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(most)}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.claims.collective_bytes", json.dumps(cases)],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    received = json.loads(done.stdout.splitlines()[-1])
    return [case | {"forward": f, "backward": b} for case, (f, b) in zip(cases, received)]


def compiled(method: str, W: int, L: int, H: int, K: int, V: int) -> str:
    """Returns the HLO of a loss and its gradients, with a sequence of W L tokens over W ranks."""
    operator, collective, letters = METHODS[method]
    sizes = {"q": (H, K), "k": (H, K), "v": (H, V), "g": (H,), "b": (H,)}
    arrays = [jax.ShapeDtypeStruct((1, W * L, *sizes[letter]), jnp.float32) for letter in letters]
    time = PartitionSpec(None, "seq")
    mesh = jax.make_mesh((W,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:W])

    def output(*arrays):
        result = operator(*arrays, axis_name="seq", collective=collective)
        return result if letters == "qkv" else result[0]

    over_ranks = jax.shard_map(output, mesh=mesh, in_specs=time, out_specs=time, check_vma=False)
    loss = jax.grad(lambda *x: jnp.sum(over_ranks(*x) ** 2), argnums=tuple(range(len(arrays))))
    return jax.jit(loss).lower(*arrays).compile().as_text()


def received(text: str, W: int) -> tuple[list[int], list[int]]:
    """Returns the bytes that come to each rank from others, forward and backward."""
    both = np.zeros((2, W), int)
    for visit in hlo.HloModule(text).visits():
        instruction = visit.instruction
        size = visit.times * sum(array.bytes for array in instruction.arrays)
        backward = int("transpose(" in instruction.attributes)
        if instruction.operation == "collective-permute":
            for source, target in hlo.groups(instruction, W):
                both[backward, target] += size * (source != target)
        elif instruction.operation == "all-gather":  # the result has every rank's part
            both[backward] += size // W * (W - 1)
        elif instruction.operation == "reduce-scatter":  # the result is one part of every rank's
            both[backward] += size * (W - 1)
        elif instruction.operation in ("all-reduce", "all-to-all"):
            raise ValueError(f"a collective that no method has: {instruction.operation}")
    return both[0].tolist(), both[1].tolist()


def main() -> None:
    cases = json.loads(sys.argv[1])
    print(json.dumps([received(compiled(**case), case["W"]) for case in cases]))


if __name__ == "__main__":
    main()
