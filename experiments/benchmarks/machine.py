"""Describes the machine that a measurement was made on."""

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import jax

from experiments.training import run_record

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def environment() -> dict:
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "git": run_record.git_state(),
        "device": f"{device.device_kind} ({device.platform})",
        "devices": jax.device_count(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def describe(environment: dict) -> str:
    """Returns what `environment` found as one line of text: date, device, processor, versions."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{environment['date']} | {environment['device']} | {environment['cores']} cores of "
        f"{environment['cpu']} (load {environment['load_average'][0]:.1f}) | "
        f"python {environment['python']}, {versions}"
    )


def cpu_model() -> str:
    """Returns the processor's name from /proc/cpuinfo or, where that has none, from `platform`."""
    return proc("cpuinfo").get("model name") or platform.processor() or platform.machine()


def free_bytes() -> int | None:
    """Returns the default device's free memory in bytes; None if the device does not report it."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        kilobytes = proc("meminfo").get("MemAvailable")
        return kilobytes and 1024 * int(kilobytes.split()[0])
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


def proc(name: str) -> dict[str, str]:
    """Returns {name: value} of the "name: value" lines of /proc/<name>; {} if it cannot be read."""
    try:
        lines = (Path("/proc") / name).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}
