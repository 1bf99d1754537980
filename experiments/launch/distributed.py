"""Runs one training on many hosts: how its processes meet and end, and which rows each reads.

    --distributed=auto   several processes if the environment says so (the default)
    --distributed=on     several processes, or an error that says what is missing
    --distributed=off    this process alone

`jax.distributed.initialize` finds the other processes and ends this one when another one dies.
`initialization` decides whether it is called, from flags and the environment alone:
  1. --coordinator=HOST:PORT --num_processes=N --process_id=I, or SEQMODELS_COORDINATOR,
     SEQMODELS_NUM_PROCESSES and SEQMODELS_PROCESS_ID: a free port of process 0's host.
  2. GKE with TPUs: TPU_WORKER_HOSTNAMES or MEGASCALE_NUM_SLICES names more than one host.
  3. Slurm's srun with several tasks (SLURM_STEP_NUM_TASKS; a shell of salloc counts one).
  4. Open MPI's mpirun with several ranks (OMPI_COMM_WORLD_SIZE).
  5. A Cloud TPU VM of a slice with several hosts, according to its metadata server.
JAX detects the rest, such as the address of process 0. With "on" JAX is called in any environment,
and may detect one that is not listed here (Kubernetes, with the package `kubernetes`).
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from experiments.launch.roll_call import roll_call, some

_ENVIRONMENT = {
    "coordinator": "SEQMODELS_COORDINATOR",
    "num_processes": "SEQMODELS_NUM_PROCESSES",
    "process_id": "SEQMODELS_PROCESS_ID",
}
_MPI_PORT = 8482  # of ranks on one host
_GRACE = 5.0  # seconds for which process 0, which has JAX's service, outlives its own failure
_LONGEST_END = 24 * 3600  # seconds that a process waits for others to end; one that dies ends it
_place = (0, 1)  # this process's number, and how many there are


def define_flags() -> None:
    """Defines the flags of a binary that can run on many hosts."""
    flags.DEFINE_enum(
        "distributed", "auto", ["auto", "on", "off"], "one of several processes; see distributed.py"
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster says it")
    flags.DEFINE_integer("num_processes", None, "how many processes, where no cluster says it")
    flags.DEFINE_integer("process_id", None, "which one this is, from 0")
    flags.DEFINE_float(
        "distributed_timeout", 300, "seconds to wait for all processes at the start", lower_bound=0
    )
    flags.DEFINE_integer(
        "distributed_heartbeat",
        30,
        "seconds of silence after which a process counts as dead, and all end; more where jobs are "
        "suspended",
        lower_bound=10,
    )


def initialization(
    given: Mapping[str, str | int | None], environment: Mapping[str, str]
) -> dict | None:
    """Returns arguments for `jax.distributed.initialize`, or None where this process is alone.

    given: values of the flags `coordinator`, `num_processes` and `process_id`.
    environment: the environment's variables, which stand in for flags that are None.
    Raises ValueError where only some of the three are given, or numbers are impossible.
    """
    told = {
        name: environment.get(variable) if given.get(name) is None else given[name]
        for name, variable in _ENVIRONMENT.items()
    }
    told = {name: value for name, value in told.items() if value not in (None, "")}
    if set(told) <= {"coordinator"}:
        address = told.get("coordinator")
        cluster = _gke_tpu(environment) or _slurm(environment) or _open_mpi(environment, address)
        if cluster is not None:
            return cluster | ({"coordinator_address": address} if address else {})
    if told:
        return _explicit(told)
    return {} if _tpu_vm(environment) else None


@contextlib.contextmanager
def session(options: flags.FlagValues) -> Iterator[None]:
    """Context manager: connects all processes of a run on entry, and waits for all on exit.

    It does nothing where this process is alone, and has to be entered before any other use of JAX.

    options: absl's parsed flags, with those of `define_flags`.
    Raises ValueError where the environment says too little. Ends the process where not all come
    within --distributed_timeout (`roll_call`).
    """
    arguments = None
    if options.distributed != "off":
        arguments = initialization({name: options[name].value for name in _ENVIRONMENT}, os.environ)
        if arguments is None and options.distributed == "on":
            arguments = {}
    if arguments is None:
        yield
        return
    _meet(arguments, options)
    try:
        yield
    except SystemExit:  # asked to stop, as all were
        jax.distributed.shutdown()
        raise
    jax.distributed.shutdown()  # a barrier: process 0 may have more to do


def end(code: int) -> None:
    """Ends the process with exit code `code`, without waiting for the run's other processes."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if _place[0] == 0:
        # JAX aborts the others when its service ends; their own errors and exit codes come first.
        time.sleep(_GRACE)
    os._exit(code)


def label() -> str:
    """Returns "process 1 of 4: ", to begin messages of this process; "" where it is alone."""
    return f"process {_place[0]} of {_place[1]}: " if _place[1] > 1 else ""


def agree(value: int, what: str) -> int:
    """Returns the integer `value`. Raises ValueError on all processes if their values differ."""
    if jax.process_count() > 1:
        values = np.ravel(multihost_utils.process_allgather(np.int32(value)))
        if len(set(values.tolist())) > 1:
            raise ValueError(f"processes differ in {what}: {some(list(map(str, values)))}")
    return value


def told_by_first(value: bool) -> bool:
    """Returns, on every process, the value that process 0 gives."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def check_shared(folder: Path) -> None:
    """Raises ValueError on all processes if one does not see a file of process 0's in `folder`."""
    if jax.process_count() == 1:
        return
    token = np.random.SeedSequence().entropy % 2**31
    token = int(multihost_utils.broadcast_one_to_all(np.int32(token)))
    probe = folder / f".seen-by-all-{token}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    multihost_utils.sync_global_devices("probe written")
    patience = time.monotonic() + 10
    while not probe.exists() and time.monotonic() < patience:
        time.sleep(0.1)
    seen = np.ravel(multihost_utils.process_allgather(np.int32(probe.exists())))
    if jax.process_index() == 0:
        probe.unlink()
    if not seen.all():
        blind = ", ".join(map(str, np.flatnonzero(seen == 0)))
        raise ValueError(
            f"--workdir={folder} must be a folder that all processes share; what process 0 wrote "
            f"there, processes {blind} do not see"
        )


@dataclasses.dataclass(frozen=True)
class DataShare:
    """Fields of the share of each batch that a process reads: `index` of `count` equal ones.

    Processes that hold different time ranges of the same rows (context parallelism) read the same
    share; `first` is true on one of them.
    """

    index: int = 0
    count: int = 1
    first: bool = True


@functools.lru_cache
def data_share(batch_sharding: jax.sharding.Sharding) -> DataShare:
    """Returns the share of a batch's rows that this process reads.

    batch_sharding: of arrays (B, T) over the mesh.
    Raises ValueError where two processes hold some rows in common, but not all.
    """
    pieces = len(batch_sharding.device_set)
    rows_of = {}
    for device, index in batch_sharding.devices_indices_map((pieces, pieces)).items():
        rows = range(pieces)[index[0]]
        rows_of.setdefault(device.process_index, set()).update(rows)
    shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(map(len, shares)) != pieces or len({len(rows) for rows in shares}) != 1:
        raise ValueError(
            f"the mesh cuts the batch's rows across the {len(rows_of)} processes unevenly: make "
            "data*fsdp a multiple, or a divisor, of their number"
        )
    mine = tuple(sorted(rows_of[jax.process_index()]))
    first = min(process for process, rows in rows_of.items() if tuple(sorted(rows)) == mine)
    return DataShare(shares.index(mine), len(shares), first == jax.process_index())


def global_batch(batch_sharding: jax.sharding.Sharding, batch: dict[str, np.ndarray]) -> dict:
    """Returns the global batch as arrays on the devices of all processes.

    batch: array's name -> the rows of this process's share, at full length.
    """
    count = data_share(batch_sharding).count
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding, rows, (rows.shape[0] * count, *rows.shape[1:])
        )
        for name, rows in batch.items()
    }


def _meet(arguments: dict, options: flags.FlagValues) -> None:
    global _place
    started, timeout = time.monotonic(), options.distributed_timeout
    process, count = (arguments.get(name) for name in ("process_id", "num_processes"))
    if process == 0 and "coordinator_address" in arguments:
        _check_port(arguments["coordinator_address"])
    me = f"process {'?' if process is None else process} of {count or '?'}"
    _say(f"{me} ({socket.gethostname()}, pid {os.getpid()}) waits for the others")
    with roll_call(options["workdir"].value, process, count, timeout):
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=int(timeout) + 60,  # after roll_call's
                heartbeat_timeout_seconds=options.distributed_heartbeat,
                shutdown_timeout_seconds=_LONGEST_END,
            )
        except ValueError as error:
            raise ValueError(
                f"JAX does not find the other processes: {error} Give --coordinator=HOST:PORT "
                f"--num_processes=N --process_id=I, or set {', '.join(_ENVIRONMENT.values())}"
            ) from error
    _place = (jax.process_index(), jax.process_count())
    if label():
        _say(
            f"{label()}{socket.gethostname()}, pid {os.getpid()}, {jax.local_device_count()} of "
            f"{jax.device_count()} devices; all were there after {time.monotonic() - started:.1f} s"
        )


def _explicit(told: dict[str, str | int]) -> dict | None:
    for name, variable in _ENVIRONMENT.items():
        if name not in told:
            raise ValueError(
                f"{' and '.join('--' + n for n in told)} given, but neither --{name} nor "
                f"{variable}: several processes need all three"
            )
    said = ", ".join(f"{name}={value}" for name, value in told.items())
    try:
        count, process = int(told["num_processes"]), int(told["process_id"])
        _port(told["coordinator"])
    except ValueError as error:
        raise ValueError(f"expected HOST:PORT and two numbers, got {said}") from error
    if not 0 <= process < count:
        raise ValueError(f"process {process} of {count}; they count from 0")
    arguments = _one_of(count, process)
    return arguments and arguments | {
        "coordinator_address": told["coordinator"],
        "cluster_detection_method": "deactivate",
    }


def _gke_tpu(environment) -> dict | None:
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if not hosts or "TPU_WORKER_ID" not in environment:
        return None
    # Processes count through the first slice, then the second.
    per_slice = len(hosts.split(","))
    count = per_slice * int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if count == 1:  # libtpu leaves a warning in TPU_WORKER_ID where there is no TPU
        return None
    first = per_slice * int(environment.get("MEGASCALE_SLICE_ID") or 0)
    return _one_of(count, first + int(environment["TPU_WORKER_ID"]))


def _slurm(environment) -> dict | None:
    # srun sets both, and a shell of salloc, which is a step of one task, may have the job's
    # SLURM_NTASKS, which JAX goes by.
    if not {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"} <= set(environment):
        return None
    count = int(environment["SLURM_STEP_NUM_TASKS"])
    alone_on_its_node = count <= int(environment.get("SLURM_STEP_NUM_NODES") or 1)
    return _one_of(count, int(environment["SLURM_PROCID"]), alone_on_its_node)


def _open_mpi(environment, coordinator: str | None) -> dict | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    count, process, local = (
        int(environment[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK", "LOCAL_RANK")
    )
    local_count = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or count)
    arguments = _one_of(count, process, local_count == 1)
    if arguments is None:
        return None
    arguments.setdefault("local_device_ids", [local])
    if coordinator is None and local_count == count:
        arguments["coordinator_address"] = f"localhost:{_MPI_PORT}"
    elif coordinator is None and "OMPI_MCA_orte_hnp_uri" not in environment:  # from Open MPI 5 on
        if importlib.util.find_spec("mpi4py") is None:
            raise ValueError(
                "mpirun started processes on several hosts and does not say which has process 0: "
                "mpirun -x SEQMODELS_COORDINATOR=HOST:PORT ..., or install mpi4py"
            )
        arguments["cluster_detection_method"] = "mpi4py"
    return arguments


def _tpu_vm(environment) -> bool:
    """Returns whether this host is one of several Cloud TPU VMs, of one slice or several."""
    if "TPU_SKIP_MDS_QUERY" in environment:  # importing JAX sets it where there is no TPU
        return False
    hosts = _metadata("worker-network-endpoints")
    slices = re.search(r"^MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata("tpu-env"), re.MULTILINE)
    return "," in hosts or (slices is not None and int(slices[1]) > 1)


def _one_of(count: int, process: int, all_devices: bool = False) -> dict | None:
    """Returns `jax.distributed.initialize`'s arguments for one of `count` processes; None for 1.

    all_devices: the process uses all devices of its host; else JAX gives each local process one.
    """
    if count == 1:
        return None
    arguments = {"num_processes": count, "process_id": process}
    return arguments | ({"local_device_ids": []} if all_devices else {})


def _metadata(name: str) -> str:
    """Returns an attribute of this VM from Google's metadata server, "" without a server."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _port(address: str) -> int:
    host, _, port = address.rpartition(":")
    if not host:
        raise ValueError(address)
    return int(port)


def _check_port(address: str) -> None:
    """Raises ValueError where another program listens on the address's port here."""
    try:
        socket.create_server(("", _port(address))).close()
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {_port(address)}: {error.strerror}. Is another run's "
            "process 0 on this host? Give --coordinator another port"
        ) from error


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
