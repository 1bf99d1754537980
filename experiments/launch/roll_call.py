"""Names the processes of a run that are missing at its start, which JAX does not do.

If a process does not come, `jax.distributed.initialize` (JAX 0.10 to 0.12) aborts the others with a
stack trace and "Deadline Exceeded", and until then it ignores Ctrl-C.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

EXIT_CODE = 5
_FOLDER = ".waiting"  # in the workdir
_TOUCH_EVERY = 5.0  # seconds


@contextlib.contextmanager
def roll_call(workdir: str | None, process: int | None, count: int | None, timeout: float):
    """Context manager: ends this process with EXIT_CODE if the block takes over `timeout` seconds.

    The block waits for the run's other processes, and the error names those that are missing.
    Meanwhile each process touches a file of its own in `workdir`, which all share.

    process, count: this process's number, and how many there are. Where they or the workdir are
      None (unknown), the error names no numbers.
    """
    name = f"{socket.gethostname()}-{os.getpid()}" if process is None else str(process)
    mine = workdir and Path(workdir, _FOLDER, name)
    came = threading.Event()

    def watch():
        deadline = time.monotonic() + timeout
        while not came.wait(max(0, min(_TOUCH_EVERY, deadline - time.monotonic()))):
            if mine:
                with contextlib.suppress(OSError):
                    mine.touch()
            if time.monotonic() >= deadline:
                print(f"error: {_missing(mine, count, timeout)}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)

    if mine:
        with contextlib.suppress(OSError):
            mine.parent.mkdir(parents=True, exist_ok=True)
            mine.write_text(f"{socket.gethostname()}, pid {os.getpid()}")
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        came.set()
        watcher.join()
        signal.signal(signal.SIGINT, interrupt)
        if mine:
            with contextlib.suppress(OSError):
                mine.unlink()
                mine.parent.rmdir()


def _missing(mine: Path | None, count: int | None, timeout: float) -> str:
    """Returns the error's text: which processes touched their file beside `mine` lately."""
    here = {}
    if mine:
        with contextlib.suppress(OSError):
            now = mine.stat().st_mtime  # by the clock of who keeps the folder
            for path in sorted(mine.parent.iterdir(), key=lambda path: (len(path.name), path)):
                if now - path.stat().st_mtime < 3 * _TOUCH_EVERY:
                    who = path.read_text()
                    here[path.name] = f"{path.name} ({who})" if path.name.isdigit() else who
    text = f"waited {timeout:.0f} s for {count or 'all'} processes"
    if here and count and mine.name.isdigit():
        missing = [str(p) for p in range(count) if str(p) not in here]
        text += f"; missing: {some(missing) or 'none, but they do not reach process 0'}"
    if here:
        text += f". Here: {some(list(here.values()))}"
    return text + (
        ". Look at the logs of the missing ones, and whether all share one --workdir; "
        "--distributed_timeout=SECONDS waits longer"
    )


def some(names: list[str]) -> str:
    """Returns the first 16 of `names` joined by commas, and how many more there are."""
    more = f" and {len(names) - 16} more" if len(names) > 16 else ""
    return ", ".join(names[:16]) + more
