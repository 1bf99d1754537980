"""Keeps libtpu, installed to compile for a TPU, from starting where there is none.

`tools.tpu_compile` is what compiles.
"""

import glob
import importlib.metadata
import importlib.util
import os
from typing import Any

import jax

_CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")
_VARIABLES = ("TPU_", "MEGASCALE_", "JAX_FORCE_TPU_INIT")
_SET_BY_JAX = {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}  # when imported, without a chip, too


def pass_over() -> None:
    """Keeps JAX from initialising libtpu on a machine without a TPU.

    Programs call it before JAX's first use; libraries leave JAX's settings alone. Nothing changes
    where platforms are chosen already, by the user or by JAX on seeing a chip, or where an
    environment variable or a device file speaks of a TPU.
    """
    config: Any = jax.config  # its type does not list the flags
    chosen = config.jax_platforms is not None
    if chosen or importlib.util.find_spec("libtpu") is None or _may_be_there():
        return
    if importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(
        group="jax_plugins"
    ):
        tell_libtpu()  # which devices a plugin has, JAX must find out: it tries libtpu, too
    else:
        jax.config.update("jax_platforms", "cpu")


def tell_libtpu() -> None:
    """Sets environment variables by which libtpu neither asks Google Cloud's metadata server, nor
    locks a chip, nor writes logs."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-4")
    # It guards a chip with /tmp/libtpu_lockfile, and would refuse a second process.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")


def _may_be_there() -> bool:
    told = any(name.startswith(_VARIABLES) and name not in _SET_BY_JAX for name in os.environ)
    return told or any(map(glob.glob, _CHIPS))
