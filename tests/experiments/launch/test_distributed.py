import concurrent.futures
import json
import socket
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.data import batches, make_dataset
from experiments.launch import distributed, rendezvous
from experiments.training import loop, metrics, steps
from experiments.training.checkpoints import Checkpoints
from tests.experiments import processes, tiny

EXACT = ("loss", "accuracy", "grad_norm", "param_norm", "learning_rate")
STEPS = 12


def test_what_environments_say():
    explicit = {"coordinator": "a:1", "num_processes": 4, "process_id": 2}
    in_environment = {
        "SEQMODELS_COORDINATOR": "[fd00::1]:1",
        "SEQMODELS_NUM_PROCESSES": "4",
        "SEQMODELS_PROCESS_ID": "2",
    }
    gke = {"TPU_WORKER_HOSTNAMES": "w-0.s,w-1.s", "TPU_WORKER_ID": "1"}
    slices = {
        "MEGASCALE_COORDINATOR_ADDRESS": "c-0.s:8080",
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
    }
    slurm = {
        "SLURM_JOB_ID": "5000",
        "SLURM_STEP_NODELIST": "node[007-010,12],other1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "4",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }
    one_a_node = {"SLURM_STEP_NUM_NODES": "8", "SLURM_STEP_NODELIST": "n1,n2", "SLURM_LOCALID": "0"}
    mpi = {
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    }
    no_tpu = {"TPU_SKIP_MDS_QUERY": "1"}
    for given, environment, expected in [
        ({}, {}, None),
        ({}, {"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "8"}, None),  # sbatch's script, not srun's tasks
        (explicit, slurm, ("a", 1, 4, 2, None)),
        ({}, in_environment, ("fd00::1", 1, 4, 2, None)),
        ({"process_id": 0}, in_environment, ("fd00::1", 1, 4, 0, None)),
        ({}, gke, ("w-0.s", 8482, 2, 1, None)),
        ({}, gke | slices, ("c-0.s", 8482, 6, 5, None)),
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, ("localhost", 8482, 1, 0, None)),
        ({}, slurm, ("node007", 61440 + 904, 8, 5, 1)),
        ({}, slurm | one_a_node, ("n1", 61440 + 904, 8, 5, None)),
        ({}, mpi, ("localhost", 8482, 4, 3, 3)),
        ({}, mpi | {"SEQMODELS_COORDINATOR": "h:5"}, ("h", 5, 4, 3, 3)),
    ]:  # fmt: skip
        job = distributed.detect(given, no_tpu | environment)
        found = job and (job.host, job.port, job.num_processes, job.process_id, job.local_device)
        assert found == expected, (given, environment)
    for given, environment, message in [
        ({"coordinator": "a:1", "process_id": 0}, {}, "neither --num_processes nor SEQMODELS_NUM"),
        (explicit | {"coordinator": "a"}, {}, "expected HOST:PORT and two numbers, got coordinator=a"),
        (explicit | {"process_id": 4}, {}, "process 4 of 4; they count from 0"),
        ({}, mpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun -x SEQMODELS_COORDINATOR"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            distributed.detect(given, no_tpu | environment)


def test_a_tpu_vm_asks_its_metadata_server(monkeypatch):
    attributes = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6",
        "tpu-env": "ACCELERATOR_TYPE: 'v6e-8'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\n",
    }
    monkeypatch.setattr(distributed, "_metadata", attributes.get)
    job = distributed.detect({}, {})
    assert (job.host, job.num_processes, job.process_id) == ("10.0.0.1", 4, 3)
    attributes["tpu-env"] = "ACCELERATOR_TYPE: 'v6e-8'\n"
    attributes["worker-network-endpoints"] = "t1v-n-0,t1v-n-1"
    job = distributed.detect({}, {})
    assert (job.host, job.num_processes, job.process_id) == ("t1v-n-0", 2, 1)
    attributes.clear()
    assert distributed.detect({}, {}) is None


def meet(members, timeout=20.0):
    """What each of (process, count) gets to hear: where JAX's service is, or why there is none."""
    port, heard = free_port(), {}
    hub = rendezvous.Hub(port, members[0][1], timeout, lambda: "here:1")

    def join(i, process, count):
        try:
            mine = hub if process == 0 else None
            member = rendezvous.Member(("localhost", port), process, count, timeout, mine)
            heard[i] = member.start_at
            member.leave()
        except ValueError as error:
            heard[i] = str(error)

    threads = [threading.Thread(target=join, args=(i, *who)) for i, who in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [heard[i] for i in range(len(members))]


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_processes_meet():
    assert meet([(0, 3), (1, 3), (2, 3)]) == ["here:1"] * 3


def test_missing_processes_are_named():
    for text in meet([(0, 4), (2, 4)], timeout=1.0):
        assert "waited 1 s for 4 processes; missing: 1, 3. Here: 0 (" in text and "2 (" in text
    with pytest.raises(
        rendezvous.Incomplete, match=r"process 1 waited 1 s for process 0 at lo\w+:\d+"
    ):
        rendezvous.Member(("localhost", free_port()), 1, 2, 1.0, None)


def test_processes_that_disagree_are_told():
    assert all("counts 3 processes, process 0 counts 2" in text for text in meet([(0, 2), (1, 3)]))
    assert all("both are process 0" in text for text in meet([(0, 3), (0, 3)]))
    with socket.create_server(("", 0)) as taken, pytest.raises(ValueError, match="cannot listen"):
        rendezvous.Hub(taken.getsockname()[1], 2, 1.0, lambda: "")


def together(count):
    """The port of a hub, and its members once all have come."""
    port = free_port()
    hub = rendezvous.Hub(port, count, 20.0, lambda: "here:1")

    def join(i):
        mine = hub if i == 0 else None
        return rendezvous.Member(("localhost", port), i, count, 20.0, mine)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return port, list(pool.map(join, range(count)))


def test_a_process_of_another_run_does_not_end_one_that_is_under_way():
    port, members = together(2)
    for process, count in ((1, 2), (2, 3)):
        with pytest.raises(rendezvous.Incomplete, match="has all its processes and takes no "):
            rendezvous.Member(("localhost", port), process, count, 20.0, None)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(rendezvous.Member.leave, members))
    assert not any(member._verdict for member in members)


@pytest.mark.parametrize("code, followed", [(2, 2), (3, 3), (4, 5), (1, 5)])
def test_a_failure_that_would_come_again_is_everybodys_exit_code(monkeypatch, code, followed):
    """A scheduler that sees a 5 beside a 2 would start them all again, for ever."""
    ended = []
    monkeypatch.setattr(rendezvous.os, "_exit", ended.append)
    monkeypatch.setattr(rendezvous, "_SETTLE", 0.1)
    monkeypatch.setattr(rendezvous, "_GRACE", 0.1)
    _, (other, failing, following) = together(3)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        cause = pool.submit(failing.fail, "the cause", code, False)
        while not other._hub._failures:
            time.sleep(0.01)
        reason, exit_code = following.fail("Gloo: gone", 1, True)
    assert "the cause" in reason and exit_code == followed and cause.result() is None
    assert other._heard.wait(60) and set(ended) == {followed}


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
    """The run of one process with one device."""
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
    """Parameters and optimizer state, restored in this one process, on one device."""
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
def test_many_processes_train_die_and_go_on(launcher, folder, alone):
    """One test, so that its runs happen once however tests are spread over workers."""
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
    run = launcher.start(logs, go, **TWO, hook=("kill_at_step_8", 1))
    run.started[1].join(240)
    assert run.wait(20) == {0: rendezvous.EXIT_CODE, 1: -9}
    assert "error: process 0 of 2 stops: process 1 of 2 (" in run.log(0)
    assert "ended without a word: killed" in run.log(0)
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
    """From (data 2, fsdp 2) on two processes to data 4 on four, in the middle of the data."""
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
def test_the_reason_of_one_is_the_reason_of_all(launcher, folder):
    go = arguments(folder, folder / "failed", **MESH)
    run = launcher.start(folder / "failed_logs", go, **TWO, hook=("fail_at_step_2", 1))
    assert run.wait(240) == {0: rendezvous.EXIT_CODE, 1: 1}
    assert "KeyError: 'no such document'" in run.log(0) and "stops: process 1 of 2 (" in run.log(0)
    assert "Traceback" in run.log(1) and "no such document" in run.log(1)


@pytest.mark.exhaustive
def test_killed_in_the_middle_of_a_save(launcher, folder):
    """What is half written is no checkpoint, is removed, and its step is saved again."""
    workdir, logs = folder / "half", folder / "half_logs"
    go = arguments(folder, workdir, **MESH)
    run = launcher.start(logs, go, **TWO, hook=("kill_in_the_save_of_step_12", 1))
    assert run.wait(240) == {0: rendezvous.EXIT_CODE, 1: -9}
    assert any((workdir / "checkpoints").glob("12.*tmp*"))
    assert Checkpoints(workdir, training=False).steps() == [6]

    assert launcher.start(logs, go, **TWO).wait(240) == {0: 0, 1: 0}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"6", "12"}
    assert (workdir / "result.json").exists()


@pytest.mark.exhaustive
def test_process_0_killed(launcher, folder):
    """With it JAX's service dies, whose clients abort the process, with a reason of their own:
    whoever is first."""
    go = arguments(folder, folder / "headless", **MESH)
    run = launcher.start(folder / "headless_logs", go, **TWO, hook=("kill_at_step_8", 0))
    run.started[0].join(240)
    codes = run.wait(20)
    assert codes[0] == -9 and codes[1] in (rendezvous.EXIT_CODE, -6)
    ours = "process 0 of 2 ended without a word: killed" in run.log(1)
    assert ours or "the leader task was preempted/died" in run.log(1).lower()


@pytest.mark.exhaustive
def test_a_folder_that_is_not_shared_is_refused(launcher, folder):
    """Two processes with a workdir each, as on two hosts without a common disk."""
    port = free_port()
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
    """Both read all rows, each holds half of the time; then both generate and score."""
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
