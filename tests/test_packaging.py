"""A bare install is enough: modules import what setup.cfg requires, and nothing else."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels_pallas", "seqmodels")
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")


def required() -> set[str]:
    """Returns the names of the packages that a bare install brings."""
    lines = CONFIG["options"]["install_requires"].split("\n")
    return {re.split("[<>=\\[]", line)[0] for line in lines if line}


def imported(path: Path) -> set[str]:
    """Returns the top-level packages that a module imports as it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_what_a_bare_install_has(package):
    allowed = {*required(), *PACKAGES, *sys.stdlib_module_names, "ml_dtypes"}  # jax brings it
    beyond = {
        path.relative_to(ROOT): imported(path) - allowed for path in (ROOT / package).rglob("*.py")
    }
    beyond = {str(path): names for path, names in beyond.items() if names}
    # Triton's kernels are imported where a GPU or the interpreter runs them.
    assert all("/gpu/" in path and names == {"triton"} for path, names in beyond.items()), beyond


def test_the_wheel_holds_two_packages_and_jax_has_no_upper_bound():
    include = CONFIG["options.packages.find"]["include"].split()
    assert include == [f"{package}*" for package in PACKAGES]
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)
    assert "<" not in CONFIG["options"]["install_requires"]
