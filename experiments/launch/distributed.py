"""One run on many hosts: which process this is, starting and ending together, and who reads which
rows of a batch.

    --distributed=auto   several processes if the environment says so (the default)
    --distributed=on     several processes, or an error that says what is missing
    --distributed=off    this process alone

What says so, in this order:
  1. --coordinator=HOST:PORT --num_processes=N --process_id=I, or SEQMODELS_COORDINATOR,
     SEQMODELS_NUM_PROCESSES, SEQMODELS_PROCESS_ID in the environment: a free port of process 0's
     host, the same on all processes.
  2. GKE with TPUs: TPU_WORKER_HOSTNAMES, TPU_WORKER_ID; for several slices
     MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_NUM_SLICES, MEGASCALE_SLICE_ID.
  3. Slurm's srun: SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_STEP_NUM_TASKS, SLURM_PROCID,
    SLURM_LOCALID.
  4. Open MPI's mpirun: OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_LOCAL_RANK. Its
     host 0 is not always told: with several hosts SEQMODELS_COORDINATOR is needed as well.
  5. A Cloud TPU VM: the metadata server's worker-network-endpoints, agent-worker-number and, for
    several slices, tpu-env.

JAX has the same detection inside `jax.distributed.initialize`, but what it found cannot be asked
for, and without the number of processes a missing one cannot be named. All processes meet at the
coordinator's port first (rendezvous.py); JAX's own service gets any free port of the same host.
"""

import contextlib
import dataclasses
import functools
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from experiments.launch.rendezvous import Hub, Member, some

_TPU_PORT = 8482  # free on TPU VMs: the runtime uses others
_ENVIRONMENT = {
    "coordinator": "SEQMODELS_COORDINATOR",
    "num_processes": "SEQMODELS_NUM_PROCESSES",
    "process_id": "SEQMODELS_PROCESS_ID",
}
_SLURM = (
    "JOB_ID",
    "STEP_NODELIST",
    "STEP_NUM_TASKS",
    "PROCID",
    "LOCALID",
)  # only srun sets them all
_member: Member | None = None


def define_flags() -> None:
    """The flags of a binary that can run on many hosts."""
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
        100,
        "seconds of silence after which a process that is there, but frozen, ends all; more where jobs are suspended",
        lower_bound=10,
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """One process's place among all. source: what told. local_device: the only device of its host
    it may use; None: all."""

    source: str
    host: str
    port: int
    num_processes: int
    process_id: int
    local_device: int | None = None


def detect(given: Mapping[str, str | int | None], environment: Mapping[str, str]) -> Job | None:
    """What flags (`coordinator`, `num_processes`, `process_id`) and environment say; None where
    they say nothing.

    Raises ValueError where they say half of it, or what cannot be.
    """
    job = (
        _explicit(given, environment)
        or _gke_tpu(environment)
        or _slurm(environment)
        or _open_mpi(environment)
        or _tpu_vm(environment)
    )
    if job and not 0 <= job.process_id < job.num_processes:
        raise ValueError(
            f"{job.source}: process {job.process_id} of {job.num_processes}; they count from 0"
        )
    return job


@contextlib.contextmanager
def session(options: flags.FlagValues) -> Iterator[None]:
    """Between all processes' start and the end of the last of them, if there are several; before
    any other use of JAX.

    An exception tells all others, which then end with its reason, wherever they are: with its exit
    code where starting again would not help (2 and 3), else with 5.
    """
    job = _job(options)
    if job is None:
        yield
        return
    _start(job, options.distributed_timeout, options.distributed_heartbeat)
    try:
        yield
    except SystemExit:  # asked to stop, as all were
        _end()
        raise
    _end()


def fail(error: BaseException, code: int) -> None:
    """Where there are several processes: tells the others, and ends this one if it fails only
    because of another.

    code: with which this one is about to exit.
    """
    if _member is None:
        return
    echo = isinstance(error, jax.errors.JaxRuntimeError)
    others = _member.fail(f"{type(error).__name__}: {error}"[:2000], code, echo)
    if others and echo:
        reason, code = others
        print(f"error: {_member.label} stops: {reason}", file=sys.stderr, flush=True)
        os._exit(code)


def end(code: int) -> None:
    """Ends the process. With several, at once: a usual exit would wait for the others inside JAX."""
    if _member is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def label() -> str:
    """ "process 1 of 4: " at the start of this process's messages; "" where it is alone."""
    return f"{_member.label}: " if _member else ""


def agree(value: int, what: str) -> int:
    """`value`, which must be the same on all processes; ValueError on all of them if it is not."""
    if jax.process_count() > 1:
        values = np.ravel(multihost_utils.process_allgather(np.int32(value)))
        if len(set(values.tolist())) > 1:
            raise ValueError(f"processes differ in {what}: {some(list(map(str, values)))}")
    return value


def told_by_first(value: bool) -> bool:
    """What process 0 has."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def check_shared(folder: Path) -> None:
    """Raises ValueError on all processes if one of them does not see what process 0 writes into
    `folder`."""
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
            f"--workdir={folder} must be a folder that all processes share; what process 0 wrote there, "
            f"processes {blind} do not see"
        )


@dataclasses.dataclass(frozen=True)
class DataShare:
    """Which part of every batch this process reads: the `index`-th of `count` equal ones. Processes
    that hold different stretches of the same rows read the same part; `first` is true on one of
    them."""

    index: int = 0
    count: int = 1
    first: bool = True


@functools.lru_cache
def data_share(batch_sharding: jax.sharding.Sharding) -> DataShare:
    """This process's share of batches (B, T) that lie as `batch_sharding` says.

    Raises ValueError where processes hold rows in common, but not the same ones.
    """
    pieces = len(batch_sharding.device_set)
    rows_of = {}
    for device, index in batch_sharding.devices_indices_map((pieces, pieces)).items():
        rows = range(pieces)[index[0]]
        rows_of.setdefault(device.process_index, set()).update(rows)
    shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(map(len, shares)) != pieces or len({len(rows) for rows in shares}) != 1:
        raise ValueError(
            f"the mesh cuts the batch's rows across the {len(rows_of)} processes unevenly: make data*fsdp a multiple, or a divisor, "
            "of their number"
        )
    mine = tuple(sorted(rows_of[jax.process_index()]))
    first = min(process for process, rows in rows_of.items() if tuple(sorted(rows)) == mine)
    return DataShare(shares.index(mine), len(shares), first == jax.process_index())


def global_batch(batch_sharding: jax.sharding.Sharding, batch: dict[str, np.ndarray]) -> dict:
    """The global batch on the devices, of which each process gives the rows of its share, at full
    length."""
    count = data_share(batch_sharding).count
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding, rows, (rows.shape[0] * count, *rows.shape[1:])
        )
        for name, rows in batch.items()
    }


def _job(options: flags.FlagValues) -> Job | None:
    if options.distributed == "off":
        return None
    job = detect({name: options[name].value for name in _ENVIRONMENT}, os.environ)
    if job is None and options.distributed == "on":
        raise ValueError(
            "--distributed=on, but nothing says which process this is: no TPU pod, srun or mpirun was found. Give --coordinator=HOST:PORT "
            f"--num_processes=N --process_id=I, or set {', '.join(_ENVIRONMENT.values())}"
        )
    return job if job and job.num_processes > 1 else None


def _start(job: Job, timeout: float, heartbeat: int) -> None:
    global _member
    started = time.monotonic()
    hub, me = None, f"process {job.process_id} of {job.num_processes}"
    if job.process_id == 0:
        hub = Hub(job.port, job.num_processes, timeout, lambda: _address(job.host, _free_port()))
        _say(f"{me}: waiting for the others on port {job.port} ({job.source})")
    _member = Member((job.host, job.port), job.process_id, job.num_processes, timeout, hub)
    jax.distributed.initialize(
        _member.start_at,
        job.num_processes,
        job.process_id,
        local_device_ids=None if job.local_device is None else [job.local_device],
        cluster_detection_method="deactivate",
        initialization_timeout=max(60, int(timeout)),
        heartbeat_timeout_seconds=heartbeat,
    )
    waited = time.monotonic() - started
    _say(
        f"{me}: {socket.gethostname()}, pid {os.getpid()}, {jax.local_device_count()} of {jax.device_count()} devices; "
        f"all were there after {waited:.1f} s"
    )


def _end() -> None:
    """A barrier, however long one process has still to do, before JAX's own, which waits only so
    long."""
    global _member
    _member.leave()
    jax.distributed.shutdown()
    _member = None


def _explicit(given, environment) -> Job | None:
    values = {
        name: environment.get(variable) if given.get(name) is None else given[name]
        for name, variable in _ENVIRONMENT.items()
    }
    said = {name: value for name, value in values.items() if value not in (None, "")}
    if not said or (set(said) == {"coordinator"} and "OMPI_COMM_WORLD_SIZE" in environment):
        return None
    for name in values:
        if name not in said:
            raise ValueError(
                f"{' and '.join('--' + n for n in said)} given, but neither --{name} nor {_ENVIRONMENT[name]}: several processes "
                "need all three"
            )
    try:
        host, port = _split(said["coordinator"])
        count, index = int(said["num_processes"]), int(said["process_id"])
    except ValueError as error:
        raise ValueError(
            f"expected HOST:PORT and two numbers, got {', '.join(f'{n}={v}' for n, v in said.items())}"
        ) from error
    return Job("flags or SEQMODELS_*", host, port, count, index)


def _gke_tpu(environment) -> Job | None:
    names = environment.get("TPU_WORKER_HOSTNAMES")
    if not names or "TPU_WORKER_ID" not in environment:
        return None
    return _tpu_job("GKE", names.split(","), int(environment["TPU_WORKER_ID"]), environment)


def _tpu_vm(environment) -> Job | None:
    # Importing JAX sets this where there is no TPU.
    if "TPU_SKIP_MDS_QUERY" in environment:
        return None
    worker, endpoints = _metadata("agent-worker-number"), _metadata("worker-network-endpoints")
    if worker is None or endpoints is None:
        return None
    # Either host names, or triples whose last part is the address.
    hosts = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]
    told = re.findall(r"^(\w+): *'?([^'\n]*)'?", _metadata("tpu-env") or "", re.MULTILINE)
    return _tpu_job("Cloud TPU VM", hosts, int(worker), dict(told) | dict(environment))


def _tpu_job(source: str, hosts: list[str], worker: int, environment) -> Job:
    """Processes count through the first slice, then the second."""
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    slice_id = int(environment.get("MEGASCALE_SLICE_ID") or 0)
    coordinator = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    host = coordinator.split(":")[0]
    process = slice_id * len(hosts) + worker
    return Job(source, host, _TPU_PORT, slices * len(hosts), process)


def _slurm(environment) -> Job | None:
    if not all(f"SLURM_{name}" in environment for name in _SLURM):
        return None
    # "node7", "node[007-012,20],other1": the first name
    prefix, first = re.match(r"([^,\[]+)(?:\[(\w+))?", environment["SLURM_STEP_NODELIST"]).groups()
    count = int(environment["SLURM_STEP_NUM_TASKS"])
    one_a_host = count <= int(environment.get("SLURM_STEP_NUM_NODES") or 1)
    return Job(
        "Slurm",
        prefix + (first or ""),
        61440 + int(environment["SLURM_JOB_ID"]) % 4096,  # two jobs on a host need two ports
        count,
        int(environment["SLURM_PROCID"]),
        None if one_a_host else int(environment["SLURM_LOCALID"]),
    )


def _open_mpi(environment) -> Job | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    count, index, local = (
        int(environment[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK", "LOCAL_RANK")
    )
    local_count = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or count)
    coordinator = environment.get("SEQMODELS_COORDINATOR")
    if not coordinator and local_count < count:
        raise ValueError(
            "mpirun started processes on several hosts and does not say which has process 0: "
            "mpirun -x SEQMODELS_COORDINATOR=HOST:PORT ..."
        )
    host, port = _split(coordinator) if coordinator else ("localhost", _TPU_PORT)
    return Job("Open MPI", host, port, count, index, None if local_count == 1 else local)


def _metadata(name: str) -> str | None:
    """An attribute of this VM, from Google's metadata server; None where there is none."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    except OSError:
        return None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host:
        raise ValueError(address)
    return host.strip("[]"), int(port)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
