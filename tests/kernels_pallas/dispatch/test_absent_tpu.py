"""libtpu where there is no TPU: programs are quiet, and every choice of the user's stands."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kernels_pallas.dispatch import absent_tpu

PLUGINS = {"libtpu": True, "jax_plugins": False}


@pytest.fixture
def machine(monkeypatch):
    """A machine with libtpu and no TPU, whose user said nothing: (config, environment, what is
    installed)."""
    config = SimpleNamespace(jax_platforms=None)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(absent_tpu, "jax", SimpleNamespace(config=config))
    installed = dict(PLUGINS)
    monkeypatch.setattr(absent_tpu.importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(absent_tpu.importlib.metadata, "entry_points", lambda group: ())
    environment = {"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "/here/libtpu.so"}
    monkeypatch.setattr(absent_tpu.os, "environ", environment)
    monkeypatch.setattr(absent_tpu, "_CHIPS", ())
    return config, environment, installed


def test_without_another_plugin_the_platform_is_the_cpu(machine):
    config, environment, _ = machine
    before = dict(environment)
    absent_tpu.pass_over()
    assert config.jax_platforms == "cpu" and environment == before


def test_another_plugin_may_find_its_devices_and_libtpu_asks_nobody(machine):
    config, environment, installed = machine
    installed["jax_plugins"] = True
    absent_tpu.pass_over()
    assert config.jax_platforms is None
    assert environment["TPU_WORKER_HOSTNAMES"] == "localhost"


@pytest.mark.parametrize("sign", ["user", "automatic", "chip", "variable", "no libtpu"])
def test_nothing_changes_where(machine, sign, monkeypatch, tmp_path):
    config, environment, installed = machine
    if sign == "user":  # or JAX, which saw a chip
        config.jax_platforms = "tpu,cpu"
    elif sign == "automatic":
        config.jax_platforms = ""
    elif sign == "chip":
        (tmp_path / "accel0").touch()
        monkeypatch.setattr(absent_tpu, "_CHIPS", (str(tmp_path / "accel*"),))
    elif sign == "variable":
        environment["TPU_WORKER_ID"] = "0"
    else:
        installed["libtpu"] = None
    before = config.jax_platforms, dict(environment)
    absent_tpu.pass_over()
    assert (config.jax_platforms, environment) == before


def test_a_program_starts_without_a_word_about_tpus():
    pytest.importorskip("libtpu")
    if any(map(absent_tpu.glob.glob, absent_tpu._CHIPS)):
        pytest.skip("there may be a TPU")
    # Other tests of this process may have compiled for TPUs.
    spoken = ("JAX_PLATFORMS", *absent_tpu._VARIABLES)
    done = subprocess.run(
        [sys.executable, "-m", "kernels_pallas.selfcheck", "--op=diagonal_scan"],
        env={name: value for name, value in os.environ.items() if not name.startswith(spoken)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "cpu" in done.stdout
    assert done.stderr == ""
