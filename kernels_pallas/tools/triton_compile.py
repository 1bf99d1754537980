"""Compiles Triton kernels for GPUs that are not there: registers, spills, shared memory.

A call is traced on shapes, its launches are recorded, and each is compiled by Triton and the ptxas
that it ships to machine code for sm_80, sm_90 and sm_100. Nothing is run. Interpreting and
compiling exclude each other in one process.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from kernels_pallas.gpu import launch as gpu_launch

CAPABILITIES = (80, 90, 100)
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}


class LaunchFigures(NamedTuple):
    """Result of `compile_launch`: the resources that one launch of a Triton kernel takes.

    registers, spilled: registers and bytes of spills per thread.
    shared, limit: bytes of shared memory per program, and how many the GPU allows.
    bytes: bytes of the inputs read once and the outputs written once.
    """

    kernel: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    spilled: int
    shared: int
    limit: int
    bytes: int


def launches(function, *shapes) -> list[gpu_launch.KernelLaunch]:
    """Returns, in order, the Triton launches of `function` on arrays of these shapes.

    The function must name the implementation 'triton'; nothing is run.
    """
    with gpu_launch.recorded() as found:
        jax.eval_shape(function, *shapes)
    return found


def compile_launch(launch: gpu_launch.KernelLaunch, capability: int) -> LaunchFigures:
    """Compiles a recorded launch for GPUs of sm_<capability> and returns its LaunchFigures.

    Raises:
      RuntimeError: Triton was imported for interpreting in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.runtime.JITFunction):
        raise RuntimeError("triton was imported for interpreting; compile in a process of its own")
    names = launch.kernel.arg_names
    arrays = (*launch.inputs, *launch.outputs)
    signature = {name: TYPES[str(x.dtype)] for name, x in zip(names, arrays)}
    signature |= dict.fromkeys(names[len(arrays) :], "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    source = ASTSource(
        launch.kernel,
        signature,
        {name: launch.constants[name] for name in names[len(arrays) :]},
        aligned,
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    return LaunchFigures(
        launch.kernel.__name__,
        launch.grid,
        launch.num_warps,
        registers,
        spilled,
        compiled.metadata.shared,
        gpu_launch.SHARED[capability / 10],
        sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in arrays),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Returns registers and stack bytes per thread of a cubin, whose stack holds spills alone."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    return int(registers), int(stack)
