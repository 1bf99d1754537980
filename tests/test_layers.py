"""Imports run one way and in no circle: read from the source, imports inside functions included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels_pallas", "seqmodels", "configs", "experiments")
# From the bottom up: a module may import from its own layer, and from those below it. The package
# kernels_pallas itself hands on what the operators' folders have.
LAYERS = (
    ("kernels_pallas.dispatch",),
    ("kernels_pallas.common",),
    ("kernels_pallas.tpu", "kernels_pallas.gpu"),
    ("kernels_pallas.ops", "kernels_pallas"),
    ("kernels_pallas.context_parallel",),
    ("kernels_pallas.tools", "kernels_pallas.selfcheck"),
    ("seqmodels",),
    ("experiments", "configs"),
)
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}


def modules(root: Path) -> dict[str, str]:
    """Source by name of every module of the packages; a package goes by its own name."""
    found = {}
    for path in sorted(p for package in PACKAGES for p in (root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path.read_text()
    return found


def imports(sources: dict[str, str]) -> dict[str, dict[str, int]]:
    """By module, the modules that it imports, each with the line."""
    found = {}
    for name, source in sources.items():
        found[name] = {}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}, line {node.lineno}: a relative import"
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [x if x in sources else node.module for x in targets]
            else:
                continue
            for target in targets:
                if target in sources and target != name:
                    found[name].setdefault(target, node.lineno)
    return found


def level(module: str) -> int:
    parts = module.split(".")
    return LEVEL[".".join(parts[: 2 if parts[0] == "kernels_pallas" else 1])]


def upward(found) -> list[str]:
    return [
        f"{name}, line {line}: imports {target}, which is above it"
        for name, targets in found.items()
        for target, line in targets.items()
        if level(target) > level(name)
    ]


def circles(found) -> list[str]:
    """Each circle of imports, as the way around that a walk in depth first meets."""
    done, said = set(), []

    def walk(name, way):
        if name in way:
            around = way[way.index(name) :] + [name]
            steps = [f"{a}, line {found[a][b]}" for a, b in zip(around, around[1:])]
            said.append(" -> ".join([*steps, name]))
        elif name not in done:
            for target in found[name]:
                walk(target, [*way, name])
            done.add(name)

    for name in found:
        walk(name, [])
    return said


def test_imports_run_one_way():
    assert upward(imports(modules(ROOT))) == []


def test_imports_run_in_no_circle():
    assert circles(imports(modules(ROOT))) == []


@pytest.mark.parametrize(
    "below, message",
    [
        (
            "def late():\n    from kernels_pallas import selfcheck",
            "kernels_pallas.dispatch.choose, line 2: imports kernels_pallas.selfcheck, which is above",
        ),
        (
            "import kernels_pallas.ops.api",
            "kernels_pallas.dispatch.choose, line 1: imports kernels_pallas.ops.api, which is above",
        ),
    ],
)
def test_an_upward_import_and_its_circle_are_named(below, message):
    sources = {
        "kernels_pallas.dispatch.choose": below,
        "kernels_pallas.ops.api": "from kernels_pallas.dispatch import choose",
        "kernels_pallas.dispatch": "",
        "kernels_pallas": "",
        "kernels_pallas.selfcheck": "from kernels_pallas.ops import api",
    }
    found = imports(sources)
    (said,) = upward(found)
    assert said.startswith(message)
    (circle,) = circles(found)
    assert circle.startswith("kernels_pallas.dispatch.choose, line")
    assert "kernels_pallas.ops.api, line 1" in circle
