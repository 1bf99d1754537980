import json
import os
import signal
import socket
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.data import batches, make_dataset
from experiments.launch import distributed, roll_call
from experiments.training import loop, metrics, steps
from experiments.training.checkpoints import Checkpoints
from tests.experiments import processes, tiny

EXACT = ("loss", "accuracy", "grad_norm", "param_norm", "learning_rate")
STEPS = 12
# How a process ends when another one has: by an error of a collective, or aborted by JAX.
FOLLOWED = (1, -signal.SIGABRT)


EXPLICIT = {"coordinator": "a:1", "num_processes": 4, "process_id": 2}
IN_ENVIRONMENT = {
    "SEQMODELS_COORDINATOR": "[fd00::1]:1",
    "SEQMODELS_NUM_PROCESSES": "4",
    "SEQMODELS_PROCESS_ID": "2",
}
GKE = {"TPU_WORKER_HOSTNAMES": "w-0.s,w-1.s", "TPU_WORKER_ID": "1"}
ONE_TPU_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "node[007-010,12],other1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
# Its allocation has 8 tasks, the shell is a step of one.
SALLOC = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}  # before Open MPI 5
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(
    "given, environment, expected",
    [
        ({}, {}, None),
        (EXPLICIT, SLURM, ("a:1", 4, 2, None, "deactivate")),
        ({}, IN_ENVIRONMENT, ("[fd00::1]:1", 4, 2, None, "deactivate")),
        ({"process_id": 0}, IN_ENVIRONMENT, ("[fd00::1]:1", 4, 0, None, "deactivate")),
        ({"process_id": 0, "num_processes": 1}, IN_ENVIRONMENT, None),
        ({}, GKE, (None, 2, 1, None, None)),
        ({}, GKE | SLICES, (None, 6, 5, None, None)),
        ({}, ONE_TPU_HOST, None),
        ({}, ONE_TPU_HOST | {"TPU_WORKER_ID": "WARNING: could not determine it"}, None),
        ({}, ONE_TPU_HOST | SLICES, (None, 3, 2, None, None)),
        ({}, {"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "8"}, None),  # sbatch's script
        ({}, SALLOC, None),
        ({}, SLURM, (None, 8, 5, None, None)),
        ({}, SLURM | {"SLURM_STEP_NUM_NODES": "8"}, (None, 8, 5, [], None)),
        ({"coordinator": "b:2"}, SLURM, ("b:2", 8, 5, None, None)),
        ({}, MPI | ORTE, (None, 4, 3, [1], None)),
        ({}, MPI | ORTE | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, (None, 4, 3, [], None)),
        ({}, MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, ("localhost:8482", 4, 3, [1], None)),
        ({}, MPI | {"SEQMODELS_COORDINATOR": "h:5"}, ("h:5", 4, 3, [1], None)),
    ],
)  # fmt: skip
def test_what_environments_say(given, environment, expected):
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    names += ("cluster_detection_method",)
    found = distributed.initialization(given, NO_TPU | environment)
    assert (found and tuple(found.get(name) for name in names)) == expected


@pytest.mark.parametrize(
    "given, environment, message",
    [
        ({"coordinator": "a:1", "process_id": 0}, {}, "neither --num_processes nor SEQMODELS_NUM"),
        ({"coordinator": "a:1"}, {}, "neither --num_processes nor SEQMODELS_NUM"),
        (EXPLICIT | {"coordinator": "a"}, {}, "expected HOST:PORT and two numbers, got coordinator=a"),
        (EXPLICIT | {"process_id": 4}, {}, "process 4 of 4; they count from 0"),
        ({}, MPI, "mpirun -x SEQMODELS_COORDINATOR=HOST:PORT ..., or install mpi4py"),
    ],
)  # fmt: skip
def test_half_of_it_is_refused(monkeypatch, given, environment, message):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        distributed.initialization(given, NO_TPU | environment)


def test_open_mpi_5_is_asked_by_mpi4py(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    found = distributed.initialization({}, NO_TPU | MPI)
    assert found["cluster_detection_method"] == "mpi4py" and "coordinator_address" not in found


@pytest.mark.parametrize(
    "endpoints, tpu_env, several",
    [
        ("unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6", "ACCELERATOR_TYPE: 'v6e-8'\n", True),
        ("t1v-n-0", "ACCELERATOR_TYPE: 'v6e-8'\nMEGASCALE_NUM_SLICES: '2'\n", True),
        ("t1v-n-0", "MEGASCALE_NUM_SLICES: '1'\n", False),
        ("", "", False),
    ],
)
def test_a_tpu_vm_asks_its_metadata_server(monkeypatch, endpoints, tpu_env, several):
    attributes = {"worker-network-endpoints": endpoints, "tpu-env": tpu_env}
    monkeypatch.setattr(distributed, "_metadata", attributes.get)
    assert distributed.initialization({}, {}) == ({} if several else None)


def test_a_port_that_is_taken_is_refused():
    """JAX would share the port with another run, or crash."""
    with socket.create_server(("", 0)) as taken, pytest.raises(ValueError, match="cannot listen"):
        distributed._check_port(f"localhost:{taken.getsockname()[1]}")


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


class Rows:
    """A sharding of (8, 8) whose device i, of a process, has rows [start, start + size)."""

    def __init__(self, *places):
        self.map = {
            Device(process): (slice(start, start + size),) for process, start, size in places
        }
        self.device_set = set(self.map)

    def devices_indices_map(self, shape):
        return self.map


def test_shares_of_a_batch(monkeypatch):
    for process, sharding, expected in [
        (1, Rows((0, 0, 1), (0, 1, 1), (1, 2, 1), (1, 3, 1)), (1, 2, True)),
        # Four processes, each with half the time of two halves of the rows.
        (2, Rows((0, 0, 2), (1, 0, 2), (2, 2, 2), (3, 2, 2)), (1, 2, True)),
        (3, Rows((0, 0, 2), (1, 0, 2), (2, 2, 2), (3, 2, 2)), (1, 2, False)),
        # A device order that goes to and fro between hosts.
        (1, Rows((0, 0, 1), (1, 1, 1), (0, 2, 1), (1, 3, 1)), (1, 2, True)),
        (1, Rows((0, 0, 4), (0, 0, 4), (1, 0, 4), (1, 0, 4)), (0, 1, False)),
    ]:
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert distributed.data_share(sharding) == distributed.DataShare(*expected)
    with pytest.raises(ValueError, match="across the 3 processes unevenly"):
        distributed.data_share(Rows((0, 0, 2), (1, 0, 2), (1, 2, 2), (2, 2, 2)))


def test_time_is_cut_on_the_devices(tmp_path):
    mesh = jax.make_mesh((2, 4), ("rows", "time"))
    sharding = NamedSharding(mesh, PartitionSpec("rows", "time"))
    x_BT = np.arange(32).reshape(4, 8)
    assert distributed.data_share(sharding) == distributed.DataShare(0, 1, True)
    np.testing.assert_array_equal(distributed.global_batch(sharding, {"x": x_BT})["x"], x_BT)


def test_processes_agree_or_are_told(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", lambda x: [x, 300, 300])
    assert distributed.agree(300, "steps") == 300
    with pytest.raises(ValueError, match="processes differ in steps: 200, 300, 300"):
        distributed.agree(200, "steps")


# ---- real processes ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


TWO = {"processes": 2, "devices": 2}
MESH = {"data": 2, "fsdp": 2}
CONFIG = {"train.steps": STEPS, "train.eval_every": 100, "checkpoint.every": 6}


def arguments(folder, workdir, **mesh):
    options = CONFIG | {f"mesh.{axis}": size for axis, size in mesh.items()}
    return [
        f"--config={processes.config_file(folder)}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in options.items()),
    ]


@pytest.fixture(scope="module")
def alone(folder):
    """Returns the folder of a run by one process with one device."""
    config = tiny.make_config(folder)
    config.update_from_flattened_dict(CONFIG)
    loop.train(config, folder / "alone", jax.devices()[:1])
    return folder / "alone"


def step_rows(workdir):
    return [row for row in metrics.read_metrics(workdir) if "loss" in row]


def result_of(workdir):
    return json.loads((workdir / "result.json").read_text())


def data_position(workdir):
    found = sorted((workdir / "checkpoints" / str(STEPS) / "data").glob("share_*.json"))
    return batches.join_states([json.loads(path.read_text()) for path in found])


def final_arrays(folder, workdir):
    """Returns parameters and optimizer state, restored in this process on one device."""
    config = tiny.make_config(folder)
    config = loop.resolve(config, make_dataset(config.data, "train"))
    program = steps.build(config, config.data.seq_len, jax.devices()[:1])
    found = Checkpoints(workdir, training=False)
    parts = found.restore_parts(STEPS, program.abstract_state, ("params", "training"))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(parts)]


def assert_close_runs(workdir, other):
    for row, expected in zip(step_rows(workdir), step_rows(other), strict=True):
        for name in EXACT:
            np.testing.assert_allclose(row[name], expected[name], rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(result_of(workdir)["loss"], result_of(other)["loss"], rtol=2e-5)
    assert data_position(workdir) == data_position(other)


@pytest.mark.slow
def test_missing_processes_are_named(launcher, folder):
    go = [*arguments(folder, folder / "incomplete"), "--distributed_timeout=2"]
    run = launcher.start(folder / "incomplete_logs", go, processes=4, only=[0, 2])
    assert run.wait(60) == {0: roll_call.EXIT_CODE, 2: roll_call.EXIT_CODE}
    for i in (0, 2):
        assert "error: waited 2 s for 4 processes; missing: 1, 3. Here: 0 (" in run.log(i)


def test_a_process_that_is_gone_is_missing(tmp_path):
    """Nobody touches its file any more."""
    for name in ("0", "1", "2", "10"):
        (tmp_path / name).write_text(f"host{name}")
    long_ago = time.time() - 60
    os.utime(tmp_path / "1", (long_ago, long_ago))
    said = roll_call._missing(tmp_path / "0", 5, 9)
    here = "0 (host0), 2 (host2), 10 (host10)"
    assert said.startswith(f"waited 9 s for 5 processes; missing: 1, 3, 4. Here: {here}. Look")
    said = roll_call._missing(tmp_path / "0", 1, 9)
    assert "missing: none, but they do not reach process 0. Here" in said


def test_hosts_are_named_where_numbers_are_not_known(tmp_path):
    for host in "ab":
        (tmp_path / f"{host}-7").write_text(f"{host}, pid 7")
    said = roll_call._missing(tmp_path / "a-7", None, 9)
    assert said.startswith("waited 9 s for all processes. Here: a, pid 7, b, pid 7. Look")
    assert roll_call._missing(None, 4, 9).startswith("waited 9 s for 4 processes. Look")


def test_processes_find_each_other_wherever_they_are_started(launcher, folder):
    """They come as far as a mistake in the config, which each tells with its own exit code."""

    def by_flags(i):
        return {}

    def by_environment(i):
        place = ("COORDINATOR", address), ("NUM_PROCESSES", "2"), ("PROCESS_ID", str(i))
        return {f"SEQMODELS_{name}": value for name, value in place}

    def by_slurm(i):
        own = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
        return SLURM | own | {"SLURM_PROCID": str(i), "JAX_COORDINATOR_PORT": port}

    def by_open_mpi(i):
        own = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
        own |= {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:1"}
        return MPI | own | {"OMPI_COMM_WORLD_RANK": str(i), "JAX_COORDINATOR_PORT": port}

    runs = []
    for told in (by_flags, by_environment, by_slurm, by_open_mpi):
        port = str(processes.free_port())
        address, name = f"localhost:{port}", told.__name__
        go = [*arguments(folder, folder / name, data=2), "--config.optimizer.name=adma"]
        variables = None if told is by_flags else told
        runs.append(launcher.start(folder / f"{name}_logs", go, 2, environment=variables))
    for run in runs:
        assert run.wait(120) == {0: 2, 1: 2}
        for i in range(2):
            assert f"process {i} of 2: " in run.log(i) and "1 of 2 devices" in run.log(i)
            assert f"error: process {i} of 2: unknown optimizer 'adma'" in run.log(i)


@pytest.mark.slow
def test_a_process_that_dies_ends_those_that_wait(launcher, folder):
    """There is no collective that could fail: JAX misses its heartbeats."""
    go = arguments(folder, folder / "dead", **MESH)
    run = launcher.start(
        folder / "dead_logs", go, **TWO, hook=("hang_while_1_exits", None), heartbeat=10
    )
    run.started[1].join(240)
    assert run.wait(60) == {0: -signal.SIGABRT, 1: 1}
    assert "unhealthy (stopped sending heartbeats):\n1" in run.log(0)


@pytest.mark.slow
def test_processes_with_different_configs_are_refused(launcher, folder):
    port = processes.free_port()
    runs = []
    for i in range(2):
        go = [
            *arguments(folder, folder / "unlike", **MESH),
            f"--config.data.batch_size={4 + 4 * i}",
        ]
        runs.append(launcher.start(folder / "unlike_logs", go, **TWO, only=[i], port=port))
    for i, run in enumerate(runs):
        assert run.wait(240) == {i: 2}
        assert "processes differ in their configs" in run.log(i)


@pytest.mark.slow
def test_many_processes_train_die_and_go_on(launcher, folder, alone):
    """Tests in one, so that shared runs happen once however tests are spread over workers."""
    whole = two_processes_train_as_one(launcher, folder, alone)
    killed_and_started_again_they_end_bit_for_bit_the_same(launcher, folder, whole)
    sigterm_to_one_saves_for_all_and_four_go_on(launcher, folder, whole)


def two_processes_train_as_one(launcher, folder, alone):
    workdir = folder / "whole"
    run = launcher.start(folder / "logs", arguments(folder, workdir, **MESH), **TWO)
    assert run.wait(240) == {0: 0, 1: 0}
    assert_close_runs(workdir, alone)
    (start,) = json.loads((workdir / "run.json").read_text())
    assert start["processes"] == 2 and start["devices"].startswith("4 x ")
    assert " process 0 of 2: step 12/12: loss" in run.log(0) and "test loss" in run.log(0)
    assert " process 1 of 2: " in run.log(1) and "2 of 4 devices" in run.log(1)
    assert "step 12/12" not in run.log(1) and "test loss" not in run.log(1)
    return workdir


def killed_and_started_again_they_end_bit_for_bit_the_same(launcher, folder, whole):
    workdir, logs = folder / "killed", folder / "killed_logs"
    go = arguments(folder, workdir, **MESH)
    run = launcher.start(logs, go, **TWO, hook=("kill_at_step_8", 1), heartbeat=10)
    run.started[1].join(240)
    codes = run.wait(60)
    assert codes[1] == -signal.SIGKILL and codes[0] in FOLLOWED
    assert not (workdir / "result.json").exists()

    run = launcher.start(logs, go, **TWO)
    assert run.wait(240) == {0: 0, 1: 0}
    assert f"resuming from {workdir / 'checkpoints' / '6'}" in run.log(0)
    for leaf, expected in zip(
        final_arrays(folder, workdir), final_arrays(folder, whole), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected)
    assert data_position(workdir) == data_position(whole)
    for row, expected in zip(step_rows(workdir), step_rows(whole), strict=True):
        assert [row[name] for name in EXACT] == [expected[name] for name in EXACT]


def sigterm_to_one_saves_for_all_and_four_go_on(launcher, folder, whole):
    """Goes from (data 2, fsdp 2) on two processes to data 4 on four, in the middle of the data."""
    workdir = folder / "stopped"
    go = arguments(folder, workdir, **MESH)
    run = launcher.start(folder / "stopped_logs", go, **TWO, hook=("sigterm_at_step_2", 1))
    assert run.wait(240) == {0: 143, 1: 143}
    stopped_at = step_rows(workdir)[-1]["step"]
    assert f"SIGTERM: step {stopped_at} is saved in" in run.log(0) and 2 < stopped_at < STEPS

    run = launcher.start(
        folder / "four_logs", arguments(folder, workdir, data=4, fsdp=1), processes=4
    )
    assert run.wait(240) == {i: 0 for i in range(4)}
    assert f"resuming from {workdir / 'checkpoints' / str(stopped_at)}" in run.log(0)
    assert_close_runs(workdir, whole)


@pytest.mark.exhaustive
@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_tells_why_and_ends_the_others(launcher, folder, failing):
    go = arguments(folder, folder / f"failed{failing}", **MESH)
    run = launcher.start(
        folder / f"failed_logs{failing}", go, **TWO, hook=("fail_at_step_2", failing), heartbeat=10
    )
    codes = run.wait(240)
    assert codes[failing] == 1 and codes[1 - failing] in FOLLOWED
    assert "Traceback" in run.log(failing) and "no such document" in run.log(failing)


@pytest.mark.exhaustive
def test_killed_in_the_middle_of_a_save(launcher, folder):
    """A half-written checkpoint does not count, is removed, and its step is saved again."""
    workdir, logs = folder / "half", folder / "half_logs"
    go = arguments(folder, workdir, **MESH)
    run = launcher.start(logs, go, **TWO, hook=("kill_in_the_save_of_step_12", 1), heartbeat=10)
    codes = run.wait(240)
    assert codes[1] == -signal.SIGKILL and codes[0] in FOLLOWED
    assert any((workdir / "checkpoints").glob("12.*tmp*"))
    assert Checkpoints(workdir, training=False).steps() == [6]

    assert launcher.start(logs, go, **TWO).wait(240) == {0: 0, 1: 0}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"6", "12"}
    assert (workdir / "result.json").exists()


@pytest.mark.exhaustive
def test_process_0_killed(launcher, folder):
    """JAX's service dies with it, and its clients abort at once, if no collective fails before."""
    go = arguments(folder, folder / "headless", **MESH)
    run = launcher.start(folder / "headless_logs", go, **TWO, hook=("kill_at_step_8", 0))
    run.started[0].join(240)
    codes = run.wait(20)
    assert codes[0] == -signal.SIGKILL and codes[1] in FOLLOWED


@pytest.mark.exhaustive
def test_a_folder_that_is_not_shared_is_refused(launcher, folder):
    """Two processes have a workdir each, as on two hosts without a common disk."""
    port = processes.free_port()
    runs = []
    for i in range(2):
        go = arguments(folder, folder / f"own{i}", **MESH)
        runs.append(launcher.start(folder / f"own_logs{i}", go, **TWO, only=[i], port=port))
    for i, run in enumerate(runs):
        assert run.wait(240) == {i: 2}
        assert "must be a folder that all processes share" in run.log(i)
        assert "processes 1 do not see" in run.log(i)


@pytest.mark.exhaustive
def test_processes_with_parts_of_the_time(launcher, folder, alone):
    """Both read all rows, and each holds half of the time. Then both generate and score."""
    workdir = folder / "time"
    go = [*arguments(folder, workdir, data=1, seq=4), "--config.sample.length=3"]
    assert launcher.start(folder / "time_logs", go, **TWO).wait(240) == {0: 0, 1: 0}
    assert_close_runs(workdir, alone)
    names = [p.name for p in (workdir / "checkpoints" / str(STEPS) / "data").glob("*.json")]
    assert names == ["share_0_of_1.json"]
    assert "sample" in result_of(workdir)

    go = [f"--workdir={workdir}", "--max_batches=1"]
    run = launcher.start(folder / "scores_logs", go, **TWO, binary="evaluate")
    assert run.wait(240) == {0: 0, 1: 0}
    scores = json.loads((workdir / "evaluation_test.json").read_text())
    np.testing.assert_allclose(scores["loss"], result_of(workdir)["loss"], rtol=1e-6)
    assert scores["tokens"] == result_of(workdir)["tokens"]
    assert "written:" in run.log(0) and "written:" not in run.log(1)
