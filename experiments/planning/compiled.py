"""Compiles the training step of a candidate for its slice, and reads what it costs."""

import importlib.metadata
import math
import re
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax

from experiments.data import batches
from experiments.planning import collectives, estimate
from experiments.planning.candidates import Candidate, Row
from kernels_pallas.tools import hlo, tpu_bundles, tpu_compile

_TOO_MUCH = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")


class CompiledStep(NamedTuple):
    """Result of compiling a training step.

    text: the optimised HLO program; None where it needs more HBM than a device has.
    memory: XLA's buffers on one device in bytes; results in place of donated state do not count.
    xla: FLOPs and bytes as XLA counts them. kernels: FLOPs of Pallas kernels by name.
    seconds, processor_seconds: wall and processor time of compiling.
    """

    text: str | None
    memory: Row
    xla: Row
    kernels: Mapping[str, float]
    seconds: float
    processor_seconds: float


def plan(candidate: Candidate) -> Row:
    """Compiles a candidate's training step; returns its settings, memory, costs and collectives.

    A step that needs more HBM than a device has makes a row without costs and collectives.
    """
    return read(candidate, compile_step(candidate))


def compile_step(candidate: Candidate) -> CompiledStep:
    """Traces, lowers and compiles a candidate's training step for its TPU slice."""
    config, where, program = candidate
    shape = (config.data.batch_size, config.data.seq_len)
    batch = {
        name: jax.ShapeDtypeStruct(shape, x.dtype, sharding=program.batch_sharding)
        for name, x in batches.empty(1, 1).items()
    }
    start = time.perf_counter(), time.process_time()
    with tpu_compile.tracing_for(where.topology):
        traced = program.train_step.trace(program.abstract_state, batch)
        lowered = traced.lower(lowering_platforms=("tpu",))
        kernels = kernel_flops(traced.jaxpr.jaxpr)
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (found := _TOO_MUCH.search(str(error))):
            raise
        executable, text = None, None
        used, used_unit, limit, limit_unit = found.groups()
        memory = {"needed": _bytes(used, used_unit), "usable": _bytes(limit, limit_unit)}
        xla = {}
    else:
        text = executable.as_text()
        memory = _memory(executable.memory_analysis())
        counted = executable.cost_analysis()
        xla = {"flops": counted.get("flops"), "bytes": counted.get("bytes accessed")}
    took = time.perf_counter() - start[0], time.process_time() - start[1]
    return CompiledStep(text, memory, xla, kernels, *took)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _memory(analysis) -> Row:
    found = {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    peak = getattr(analysis, "peak_memory_in_bytes", None)
    return found | {"peak": peak, "needed": sum(found.values())}


def read(candidate: Candidate, step: CompiledStep) -> Row:
    """Returns a candidate's row: settings, memory and, where it compiled, costs and collectives."""
    row = described(candidate) | {
        "memory": step.memory,
        "needed_bytes": step.memory["needed"],
        "compile_seconds": step.seconds,
        "compile_cpu_seconds": step.processor_seconds,
    }
    if step.text is None:
        return row | {"usable_bytes": step.memory["usable"]}
    mesh = candidate.program.batch_sharding.mesh
    machine = estimate.Machine(candidate.where, mesh, step.kernels)
    return row | {"xla": step.xla} | costs(hlo.HloModule(step.text), machine, row)


def described(candidate: Candidate) -> Row:
    """Returns what a candidate's row holds before compiling: slice, mesh, config, parameters."""
    config, where, program = candidate
    mesh = program.batch_sharding.mesh
    params = program.abstract_state.params
    embedding = math.prod(params["embed"]["embedding"].shape) if "embed" in params else 0
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    tied = config.model.get("tied_embeddings", True)
    parallel = config.get("parallel", {})
    return {
        "topology": where.topology,
        "devices": len(where.devices),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "collective": parallel.get("collective") if mesh.shape.get("seq", 1) > 1 else None,
        "zero": parallel.get("zero", 0),
        "pattern": config.model.pattern,
        "remat": config.model.get("remat"),
        "batch_size": config.data.batch_size,
        "seq_len": config.data.seq_len,
        "accumulate": config.train.accumulate,
        "parameters": parameters,
        "multiplied_parameters": parameters - (0 if tied else embedding),
        "state_bytes": candidate.state_bytes,
        "hbm_bytes_a_device": where.part.hbm_bytes,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }


def costs(module: hlo.HloModule, machine: estimate.Machine, row: Row) -> Row:
    """Returns what a compiled step's HLO adds to its `row`: FLOPs, bytes, collectives, times."""
    where = machine.where
    sent = [c for v in module.visits() if (c := collectives.read(v, module, machine.mesh, where))]
    cost = estimate.cost(module, machine)
    tokens = row["batch_size"] * row["seq_len"]
    peak = where.part.bf16_flops_per_second * row["devices"]
    useful = 6 * row["multiplied_parameters"] * tokens
    cycles = cost.compiler_cycles / where.part.clock_hz if where.part.clock_hz else None
    return {
        "flops": cost.flops,
        "kernel_flops": cost.kernel_flops,
        "hbm_bytes": cost.hbm_bytes,
        "loops_counted_once": module.unknown_loops,
        "model_flops": useful,
        "loops_once": {
            "flops": sum(hlo.flops(module, visit) for visit in module.visits()),
            "bytes": sum(
                estimate.hbm_bytes(module, visit.computation, visit.instruction)
                for visit in module.visits()
                if not visit.fused
            ),
        },
        "collectives": collectives.grouped(sent),
        "estimate": {
            "seconds": cost.seconds,
            "compute_seconds": cost.compute_seconds,
            "communication_seconds": cost.communication_seconds,
            "waiting_seconds": cost.waiting_seconds,
            "floor_seconds": max(
                cost.flops * row["devices"] / peak,
                cost.hbm_bytes / where.part.hbm_bytes_per_second,
                cost.communication_seconds,
            ),
            "compiler_seconds": cycles,
            "tokens_per_second": tokens / cost.seconds,
            "mfu": useful / peak / cost.seconds,
        },
    }


def kernel_flops(jaxpr) -> Mapping[str, float]:
    """Returns {Pallas kernel's name: FLOPs of its matrix products over its grid}, on one device."""
    found = {}
    for call in tpu_bundles.pallas_calls(jaxpr):
        steps_of_grid = math.prod(call.params["grid_mapping"].grid)
        name = re.sub(r"\W", "_", str(call.params["name"]))
        found[name] = steps_of_grid * _dots(call.params["jaxpr"])
    return found


def _dots(jaxpr) -> float:
    """Returns FLOPs of the matrix products in a kernel's body, all iterations and branches."""
    total = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "dot_general":
            left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            summed = params["dimension_numbers"][0][0]
            total += 2 * math.prod(result) * math.prod(left[i] for i in summed)
            continue
        total += params.get("length", 1) * sum(map(_dots, tpu_bundles.inner_jaxprs(equation)))
    return total
