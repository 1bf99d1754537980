"""Measures one call's peak memory on a CPU, in a process of its own, beside the compiler's
estimate. Linux only."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable
from pathlib import Path

from experiments.benchmarks import machine
from experiments.benchmarks.entries import Prepared


def measure(prepare: Callable[[], Prepared], *arguments) -> dict:
    """Measures the peak memory that prepare(*arguments).run() adds to a fresh process, in bytes.

    prepare: a module-level function that returns a Prepared; it is pickled. Returns "peak_bytes",
      with results and without inputs, and "planned_bytes", the compiler's temp_bytes.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(_measure_here, prepare, arguments).result()


def _measure_here(prepare, arguments) -> dict:
    prepared = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is set to what is held now
    before = _status("VmRSS")
    prepared.run()
    return {"peak_bytes": _status("VmHWM") - before, "planned_bytes": prepared.temp_bytes}


def _status(name: str) -> int:
    return 1024 * int(machine.proc("self/status")[name].split()[0])
