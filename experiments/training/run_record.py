"""Writes and reads the record of a run in its workdir: config.json, run.json and result.json."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import zlib
from pathlib import Path

import jax
from ml_collections import ConfigDict

from configs import common

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def default_workdir(config_path: str) -> Path:
    """Returns the folder runs/<config>-<argument>-<time> for a new run of a config file."""
    path, _, argument = config_path.partition(":")
    name = "-".join(filter(None, [Path(path).stem, argument.replace("/", "_")]))
    return Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def save_config(workdir: Path, config: ConfigDict) -> list[str]:
    """Writes the config to workdir/config.json; returns its differences from the file it replaces.

    Each is a text "field: old -> new". Fields that the earlier file lacks count as their
    defaults.
    """
    path = workdir / "config.json"
    new = _plain(config)
    changes = []
    if path.exists():
        old = json.loads(path.read_text())
        changes = _changes(*(_plain(common.with_defaults(fields)) for fields in (old, new)))
    write_json(path, new)
    return changes


def checksum(config: ConfigDict) -> int:
    """Returns a 31-bit hash of a config, by which processes check that theirs are equal."""
    return zlib.crc32(json.dumps(_plain(config), sort_keys=True).encode()) >> 1


def _plain(config: ConfigDict) -> dict:
    return json.loads(json.dumps(config.to_dict()))


def load_config(workdir: str | Path) -> ConfigDict:
    """Returns the config of the run in a folder. Raises ValueError if it holds no run."""
    if not workdir:
        raise ValueError("give the --workdir of a training run")
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise ValueError(
            f"{workdir} holds no run: there is no {path}. Give the --workdir of a training run"
        )
    if holds_linearization(workdir):
        raise ValueError(
            f"{workdir} holds a linearization; its student is a run: {workdir}/student, or "
            f"{workdir}/member_1 and so on of an ensemble"
        )
    return common.with_defaults(json.loads(path.read_text()))


def holds_linearization(workdir: str | Path) -> bool:
    """Returns whether the folder is one of `experiments.linearize`, with runs in it."""
    path = Path(workdir) / "config.json"
    fields = json.loads(path.read_text()) if path.exists() else {}
    made = "linearize" in fields or "progressive" in fields
    return made and not (Path(workdir) / "checkpoints").is_dir()


def record_start(workdir: Path, step: int, changes: list[str]) -> None:
    """Appends a start of the run to run.json: time, step, command, git commit and devices."""
    path = workdir / "run.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    device = jax.devices()[0]
    starts.append(
        {
            "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "step": step,
            "config_changes": changes,
            "command": sys.argv,
            "git": git_state(),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
            "processes": jax.process_count(),
        }
    )
    write_json(path, starts)


def git_state() -> dict | None:
    """Returns git's commit and whether files have uncommitted changes; None without a checkout."""

    def git(*arguments):
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: to a temporary file, which is then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _changes(old, new, path: str = "config") -> list[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
    changes = []
    for name in sorted(old.keys() | new.keys()):
        here = f"{path}.{name}"
        if name not in new:
            changes.append(f"{here}: {old[name]!r} -> (no such field)")
        elif name not in old:
            changes.append(f"{here}: (no such field) -> {new[name]!r}")
        else:
            changes += _changes(old[name], new[name], here)
    return changes
