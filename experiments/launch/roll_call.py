"""Names the processes of a run that are missing at its start, which JAX does not do.

Where a process does not come, `jax.distributed.initialize` (JAX 0.10 to 0.12) aborts the others
with a stack trace and "Deadline Exceeded", and until then it does not hear Ctrl-C.
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
    """Ends this process with EXIT_CODE, naming the missing ones, if the block takes too long.

    While it waits, each process touches a file of its own in `workdir`, which all share. Numbers
    of processes, and the workdir, are None where they are not known: then no number is named.
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
    """Describes which processes touched their file beside `mine` lately, and which did not."""
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
    """Joins the first 16 names by commas."""
    more = f" and {len(names) - 16} more" if len(names) > 16 else ""
    return ", ".join(names[:16]) + more
