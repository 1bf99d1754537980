"""Decides whether a kernel may serve calls that name no implementation, by a check on first use.

A kernel proven by compiling and interpreting may be wrong on hardware that its tests never saw. So
when `implementation=None` is about to choose a kernel, `unverified_reason` wants a passed check
(`kernel_check.check`, forward and backward against the chunked form) of this operator,
implementation, kind of call and kind of device, of these versions of JAX, the kernel's compiler and
our own source, and with 64-bit types on or off as they are now. What is not on record is checked
then and there, in seconds. Where the check fails, the next implementation serves, and one warning
per process says what differed. A kernel that is named in `implementation=` is never checked.

Records are kept for the process, and on disk in `cache_file()`. A file that cannot be read or
written only means checking again. An exception is not written down: by the next process its cause,
such as a lack of memory, may be gone.

Operators are mostly called inside a trace (of jit, grad, vmap or shard_map, perhaps under a mesh).
All of that belongs to the thread that traces, so the check runs in a thread of its own, as in a
fresh program, and no tracer can reach it.

For an abstract target, a kind of device that this process does not have (compiling ahead of time),
nothing can be run: the kernel is taken unchecked.

With several processes each checks on its own device and nothing is exchanged, because no process
can know whether the others trace the same call now. The check has the same inputs and program
everywhere, so that equal machines decide alike. A process that decides otherwise (broken hardware)
warns, and compiles another program than the rest: name the implementation to rule that out.
"""

import concurrent.futures
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
import warnings
from typing import Any

import jax

from kernels_pallas.dispatch import devices, kernel_check

_CONFIG: Any = jax.config  # flags are attributes that its type does not list

_COMPILERS = {"tpu": ("libtpu",), "gpu": ("triton", "jax-triton")}
_SHARED_FOLDERS = ("common", "dispatch", "tpu", "gpu")
_decided: dict[str, str | None] = {}


def unverified_reason(operator, implementation: str, arguments: dict) -> str | None:
    """Returns None if this call of a `dispatch.Operator` may use the kernel, else the reason.

    A kernel may be used once it has matched the chunked form, forward and backward, on this device
    kind with these library versions. What is not on record is checked; the process's first failure
    of each kind warns.
    """
    target, device = devices.current(), jax.local_devices()[0]
    if operator.case is None or target.kind != device.device_kind:
        return None
    call = (implementation, *operator.case.kind_of(**arguments))
    key = record_key(target, operator.name, *call)
    if key in _decided:
        return _decided[key]
    problem, known = _recorded(key)
    if not known:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            result = thread.submit(_check, _CONFIG.jax_enable_x64, operator, *call).result()
        problem = result.problem
        record(key, result)
    if key not in _decided:  # another thread may have been first
        _decided[key] = problem
        if problem is not None:
            warnings.warn(_explained(target, operator.name, *call, problem=problem), stacklevel=6)
    return _decided[key]


def _check(x64: bool, operator, *call) -> kernel_check.CheckResult:
    """Runs the kernel check with jax_enable_x64 as in the caller's thread: it is thread-local."""
    with jax.enable_x64(x64):
        return kernel_check.check(operator, *call)


def _explained(target, operator, implementation, kind, dtype, problem) -> str:
    return (
        f"{operator}: the kernel {implementation!r} failed its check on {target.kind} "
        f"({kind}, {dtype}): {problem}. The next implementation serves in its place. Please report "
        "this: run `python -m kernels_pallas.selfcheck` and paste its table into an issue. "
        f"implementation={implementation!r} runs the kernel unchecked."
    )


def record_key(target: devices.Target, operator: str, *call: str) -> str:
    """Returns the key of a check's record: call, kind of device, versions, hash of the source.

    call: the implementation, the kind of call and the dtype.
    """
    found = ", ".join(f"{name} {version}" for name, version in versions(target.platform).items())
    x64 = " | x64" if _CONFIG.jax_enable_x64 else ""
    return (
        f"{operator} {' '.join(call)} | {target.kind} | {found} | source {_source(operator)}{x64}"
    )


@functools.cache
def versions(platform: str) -> dict[str, str]:
    """Returns the installed versions of JAX and of the compilers of kernels for 'tpu' or 'gpu'."""
    found = {}
    for name in ("jax", "jaxlib", *_COMPILERS.get(platform, ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


@functools.cache
def _source(operator: str) -> str:
    """Returns a hash of the source files that an operator's results depend on."""
    package, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for folder in (*_SHARED_FOLDERS, f"ops/{operator}"):
        for path in sorted((package / folder).rglob("*.*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cache_file() -> pathlib.Path:
    """Returns the path of the file that records the results of kernels' checks."""
    return cache_folder() / "selfcheck.json"


def cache_folder() -> pathlib.Path:
    """Returns the folder of recorded checks: $SEQMODELS_CACHE, or one in the user's cache.

    That is `seqmodels` in $XDG_CACHE_HOME or in ~/.cache. `~` is the user's home in all three;
    without a home it is a temporary folder.
    """
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    own = os.environ.get("SEQMODELS_CACHE") or os.path.join(general, "seqmodels")
    folder = os.path.expanduser(own)
    if folder.startswith("~"):  # nobody knows whose home that is
        folder = os.path.join(tempfile.gettempdir(), f"seqmodels-{os.getuid()}")
    return pathlib.Path(folder)


def _records() -> dict:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _recorded(key: str) -> tuple[str | None, bool]:
    """Returns (the recorded problem or None, whether the check has a record)."""
    entry = _records().get(key)
    if not isinstance(entry, dict) or not isinstance(entry.get("problem", 0), str | None):
        return None, False
    return entry["problem"], True


def record(key: str, result) -> None:
    """Writes the result of a kernel's check to the file of records, unless it raised an exception.

    The file is replaced atomically: other processes may be writing, too.
    """
    if result.raised:
        return
    entry = {
        "problem": result.problem,
        "forward": result.forward,
        "gradient": result.gradient,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    path = cache_file()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as file:
            json.dump(_records() | {key: entry}, file, indent=1)
        os.replace(temporary, path)
    except OSError:  # a full or read-only disk: the next process checks again
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)
