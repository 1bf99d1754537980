"""Starts several processes of a binary on this machine.

They are forked from one that has imported everything, so that starting one costs no imports.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

# What is slow to import, and starts no thread and no JAX backend.
import matplotlib.pyplot  # noqa: F401

from experiments.launch import cli  # noqa: F401
from experiments.training import checkpoints, loop, plots, run_record  # noqa: F401
from seqmodels.text import tokenizers  # noqa: F401
from tests.experiments import tiny  # noqa: F401

_CONFIG = """
from pathlib import Path
from tests.experiments import tiny

def get_config():
    return tiny.make_config(Path({folder!r}))
"""


class Launcher:
    """Starts processes of `python -m experiments.<binary>` on loopback."""

    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    def start(
        self,
        logs: Path,
        arguments: list[str],
        processes: int,
        *,
        devices: int = 1,
        only: Sequence[int] | None = None,
        port: int | None = None,
        binary: str = "train",
        hook: tuple[str, int | None] | None = None,
        heartbeat: int = 3600,  # a loaded machine is no dead one
        environment: Callable[[int], dict[str, str]] | None = None,
    ) -> "Processes":
        """Starts processes 0 to processes - 1, or those in `only`.

        hook: the name of a function of this file that is called at every step with (step, workdir),
          and by which process; None is all of them.
        environment: from a process's number, variables that tell it and its place in the run; None:
          flags do.
        """
        logs.mkdir(parents=True, exist_ok=True)
        port = port or free_port()
        started = {}
        for i in range(processes) if only is None else only:
            mine = hook[0] if hook and hook[1] in (i, None) else None
            log, own = logs / f"{i}.log", list(arguments)
            if processes > 1:
                own += [f"--distributed_heartbeat={heartbeat}"]
            if processes > 1 and not environment:
                place = {"coordinator": f"localhost:{port}", "num_processes": processes}
                own += [f"--{n}={value}" for n, value in (place | {"process_id": i}).items()]
            variables = environment(i) if environment else {}
            target = self._context.Process(
                target=_run, args=(binary, own, log, devices, mine, variables)
            )
            target.start()
            started[i] = target
        return Processes(started, logs)


class Processes:
    def __init__(self, started, logs: Path):
        self.started, self._logs = started, logs

    def wait(self, seconds: float) -> dict[int, int]:
        """Returns exit codes by process. Kills and fails if one still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.started.values():
            process.join(max(0, deadline - time.monotonic()))
        stuck = [i for i, process in self.started.items() if process.is_alive()]
        for i in stuck:
            self.started[i].kill()
        assert not stuck, f"processes {stuck} still ran after {seconds} s:\n" + "\n".join(
            map(self.log, self.started)
        )
        return {i: process.exitcode for i, process in self.started.items()}

    def log(self, i: int) -> str:
        return (self._logs / f"{i}.log").read_text()


def kill_at_step_8(step, workdir):
    """Kills the process once the checkpoint of step 6 is there."""
    if step == 8:
        while not (workdir / "checkpoints" / "6").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def kill_in_the_save_of_step_12(step, workdir):
    """Kills the process once the checkpoint's temporary folder is there."""

    async def save(self, directory):
        async def write():
            await directory.await_creation()
            os.kill(os.getpid(), signal.SIGKILL)

        return write()

    if step == 12:
        checkpoints.DataPosition.save = save


def sigterm_at_step_2(step, workdir):
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)  # JAX looks for the signal once a second


def fail_at_step_2(step, workdir):
    if step == 2:
        raise KeyError("no such document")


def hang_while_1_exits(step, workdir):
    if step == 2 and jax.process_index() == 1:
        os._exit(1)
    if step == 2:
        time.sleep(600)


def config_file(folder: Path) -> Path:
    path = folder / "config.py"
    if not path.exists():  # a process that has been started may be reading it
        path.write_text(_CONFIG.format(folder=str(folder)))
    return path


def _run(binary, arguments, log, devices, hook, environment):
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    jax.config.update("jax_num_cpu_devices", devices)
    if hook:
        workdir = Path(next(a.split("=", 1)[1] for a in arguments if a.startswith("--workdir=")))
        requested = loop.StopSignals.requested

        def hooked(self, step):
            globals()[hook](step, workdir)
            return requested(self, step)

        loop.StopSignals.requested = hooked
    sys.argv = [f"experiments/{binary}.py", *arguments]
    try:
        runpy.run_module(f"experiments.{binary}", run_name="__main__")
    finally:
        print("CPU", time.process_time(), flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
