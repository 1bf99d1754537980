"""Compiles for TPUs on a machine that has none, by libtpu from PyPI (pip install -e '.[tpu]').

    from kernels_pallas.tools import tpu_compile

    x = jax.ShapeDtypeStruct((1, 8192, 256), jnp.bfloat16)
    compiled = tpu_compile.compile_for("v6e", function, x)      # or for a slice: "v5p:4x4x8"
    compiled.hlo                            # the optimised program, scheduled; `hlo` reads it
    compiled.memory.temp_size_in_bytes      # compiled.cost: what the compiler counts
    compiled.listings                       # machine code of each Pallas kernel; see `tpu_bundles`

Arguments are pytrees of ShapeDtypeStruct, or of arrays, of which only shape and dtype count. The
function is traced for that generation: inside, `dispatch.devices.current()` is a TPU of its kind. A
kernel that does not fit, or that Mosaic cannot lower, raises here as it would on the machine.
Nothing is run, and no number from here is a time.

Run with JAX_PLATFORMS=cpu. Several processes may compile at once. libtpu reads its environment when
it is loaded: `_prepare_environment` and `dispatch.absent_tpu` are the places that set it.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import tempfile
import threading
from typing import Any, NamedTuple, cast

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from kernels_pallas.dispatch import absent_tpu
from kernels_pallas.tools import hlo


class TpuPart(NamedTuple):
    """Properties of a TPU generation, per JAX device: a chip, or half a chip of tpu7x.

    topology: the smallest slice that libtpu compiles for.
    cores: TensorCores per device; v5p's two appear as one ("megacore").
    vmem_bytes: VMEM of one core. A kernel's own limit starts lower:
      `pltpu.CompilerParams(vmem_limit_bytes=...)`.
    mxu: the edge of a matrix unit, and the number of units per core.
    clock_hz: from peak FLOP/s = 2 * cores * units * edge**2 * clock; None where that gives no
      possible clock.
    """

    topology: str
    device_kind: str
    cores: int
    vmem_bytes: int
    hbm_bytes: int
    hbm_bytes_per_second: float
    mxu: tuple[int, int]
    bf16_flops_per_second: float
    clock_hz: float | None


# HBM, bandwidth, peak: https://cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. VMEM and matrix
# units: `pltpu.get_tpu_info_for_chip` (tests compare). v6e's two 256 x 256 units would need 3.5 GHz
# for the published 918 TFLOP/s, so that its clock, like tpu7x's, cannot be derived.
PARTS = {
    "v5e": TpuPart(
        "v5e:2x2", "TPU v5 lite", 1, 128 << 20, 16 << 30, 819e9, (128, 4), 197e12, 1.5e9
    ),
    "v5p": TpuPart("v5p:2x2x1", "TPU v5", 2, 64 << 20, 95 << 30, 2765e9, (128, 4), 459e12, 1.75e9),
    "v6e": TpuPart(
        "v6e:2x2", "TPU v6 lite", 1, 128 << 20, 32 << 30, 1640e9, (256, 2), 918e12, None
    ),
    "tpu7x": TpuPart(
        "tpu7x:2x2x1", "TPU7x", 1, 64 << 20, 96 << 30, 3690e9, (256, 2), 1153.5e12, None
    ),
}


class Listing(NamedTuple):
    """Fields of the compiler's report on one Pallas kernel.

    bundles, utilization: texts of its VLIW bundles, and of the units that each uses.
    vmem_bytes, spill_bytes: VMEM allocated to the kernel, and how much of it spilled registers
      take.
    spill_bundles: how many fewer bundles the kernel has where the compiler packs it without spills.
    """

    bundles: str
    utilization: str
    vmem_bytes: int
    spill_bytes: int
    spill_bundles: int


class CompiledProgram(NamedTuple):
    """Result of `compile_for`: the executable with the compiler's text, counts and listings.

    part: the TPU generation, such as "v6e". hlo: the optimised program's text.
    memory, cost: results of the executable's `memory_analysis` and `cost_analysis`.
    listings: the `Listing` of each Pallas kernel, by instruction name, such as "name.1".
    """

    part: str
    executable: Any
    hlo: str
    memory: Any
    cost: dict[str, float]
    listings: dict[str, Listing]


def part_of(topology: str) -> str:
    """Returns the TPU generation of a topology: "v6e" for "v6e" itself or its slice "v6e:2x2".

    Raises:
      ValueError: the generation is none of `PARTS`, which the message lists.
    """
    part = topology.split(":")[0]
    if part not in PARTS:
        raise ValueError(
            f"unknown TPU topology {topology!r}; give one of {', '.join(PARTS)}, "
            "or a slice of one such as 'v6e:2x2'"
        )
    return part


def devices(topology: str) -> list:
    """Returns the devices of a TPU slice as targets for compiling; they cannot run anything.

    topology: a TPU generation such as "v6e", for its smallest slice, or a slice such as "v6e:2x2".

    Raises:
      ValueError: an unknown generation, or a slice that the generation does not come in.
      ImportError: libtpu is not installed.
    """
    part = part_of(topology)
    _prepare_environment()
    name = topology if ":" in topology else PARTS[part].topology
    try:
        return topologies.get_topology_desc(topology_name=name, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(f"libtpu knows no slice {name!r}: {error}") from error


@contextlib.contextmanager
def tracing_for(topology: str):
    """Context manager: makes JAX trace functions for a TPU that this machine does not have.

    Inside, code without a mesh sees one device of the topology.
    topology: a TPU generation such as "v6e", or a slice of it such as "v6e:2x2".
    """
    part = PARTS[part_of(topology)]
    device = AbstractDevice(device_kind=part.device_kind, num_cores=part.cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def compile_for(topology: str, function, *arguments) -> CompiledProgram:
    """Compiles `function(*arguments)` for one device of a TPU topology; returns a CompiledProgram.

    topology: a TPU generation such as "v6e", or a slice of it such as "v6e:2x2".
    arguments: pytrees of arrays or ShapeDtypeStructs, of which only shape and dtype count.

    Raises:
      ValueError, ImportError: the topology is unknown, or libtpu is not installed.
      jax.errors.JaxRuntimeError: what compiling on the machine would raise, as for too much VMEM;
      Pallas may raise errors of its own.
    """
    device = devices(topology)[0]

    def fresh(*arguments):  # a function of its own: one from a cache would have no listing
        return function(*arguments)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    jitted = jax.jit(fresh, in_shardings=SingleDeviceSharding(device))
    with _LOCK, tracing_for(topology):
        lowered = jitted.trace(*shapes).lower(lowering_platforms=("tpu",))
        _clear_dump()
        executable = lowered.compile()
        text = executable.as_text() or ""
        listings = _listings(text)
    return CompiledProgram(
        part_of(topology),
        executable,
        text,
        executable.memory_analysis(),
        cast(dict[str, float], executable.cost_analysis()),
        listings,
    )


def without_listings() -> None:
    """Makes the TPU compiler write no listings of kernels.

    For a large program these take longer than compiling. Call it before anything else in this
    module; `compile_for` then raises for a program with Pallas kernels.
    """
    _prepare_environment(listings=False)


_LOCK = threading.Lock()
_DUMP: Any = None  # a pathlib.Path, once libtpu was asked for it
_PASSES = "(final_.*bundle|packed-bundles-(post-ra|no-spills-fills)).*"


def _prepare_environment(listings: bool = True) -> None:
    """Sets the environment variables that libtpu reads when it is loaded, once per process.
    listings: whether the compiler writes listings of kernels."""
    global _DUMP
    if _DUMP is not None:
        return
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "compiling for a TPU needs libtpu, which is not installed: pip install -e '.[tpu]'"
        )
    _DUMP = pathlib.Path(tempfile.mkdtemp(prefix="seqmodels_tpu_"))
    atexit.register(shutil.rmtree, _DUMP, ignore_errors=True)
    absent_tpu.tell_libtpu()
    if not listings:
        return
    # Listings of the last passes only: all seventy of a kernel would double the time.
    dump = (
        f"--xla_jf_dump_to={_DUMP} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex=.*{_PASSES}"
    )
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}".strip()


_ENDINGS = (
    "final_bundles",
    "final_hlo-static-per-bundle-utilization",
    "schedule-analysis_packed-bundles-post-ra",
    "schedule-analysis_packed-bundles-no-spills-fills",
)


def _clear_dump() -> None:
    for path in _DUMP.iterdir():
        path.unlink()


def _listings(text: str) -> dict[str, Listing]:
    """Reads the compiler's `Listing` of each Pallas kernel in a program's HLO text."""
    bodies = hlo.HloModule(text).computations.values()
    names = [instruction.name for body in bodies for instruction in body if instruction.is_kernel]
    memory = {}
    for path in _DUMP.glob("*vmem_report.html"):
        data = re.search(r"const DATA\s*=\s*(\{.*?\});", path.read_text(), re.DOTALL)
        memory.update(json.loads(data[1])["hlo_breakdowns"] if data else {})
    listings = {}
    for name in dict.fromkeys(names):
        texts = []
        for ending in _ENDINGS:
            paths = [
                path
                for path in _DUMP.glob(f"*{ending}.txt")
                if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-{ending}\.txt", path.name)
            ]
            texts += [path.read_text() for path in paths[:1]]
        if len(texts) < len(_ENDINGS):
            raise RuntimeError(
                f"the compiler left no listing of kernel {name!r}: libtpu was loaded before "
                "tpu_compile could ask for one, or the program came from JAX's compilation cache"
            )
        blocks = memory.get(name, {}).get("blocks", [])
        spills = sum(b["block_size"] for b in blocks if "SPILL" in b["block_type"].upper())
        # Not the blocks' sizes: those begin where operands end that XLA keeps in VMEM around the
        # kernel.
        total = sum(a["size"] for b in blocks for a in b["allocations"])
        with_spills, without = (
            int(re.findall(r"non empty scheduled bundles: *(\d+)", text)[0]) for text in texts[2:]
        )
        listings[name] = Listing(texts[0], texts[1], total, spills, with_spills - without)
    return listings
