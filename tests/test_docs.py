"""What the docs say is so: made pages, links, lengths, and the code of the first tutorial."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from docs import make
from seqmodels import mixers
from tests.seqmodels.mixers import mixer_suite

ROOT = Path(make.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "WORKSPACE.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
TUTORIAL = ROOT / "docs/tutorials/first_mixer.md"


def test_what_the_docs_take_from_the_code_is_what_it_says():
    stale = [path.name for path, text in make.made().items() if path.read_text() != text]
    assert not stale, "run python docs/make.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)#]+)[)#]", text) + re.findall(r"(?m)^\[[^]]+\]: (.+)$", text)
    links = [link for link in links if not link.startswith("http")]
    assert not [link for link in links if not (path.parent / link).exists()]


def paths_named(text: str) -> set[str]:
    """Returns what a page names and looks like a path: in backticks, commands and WORKSPACE's map.

    Of "{a,b}.py" each is one; "<name>" stands for any; "name.py:argument" is a config.
    """
    top = "configs|experiments|kernels_pallas|seqmodels|tests|docs|colabs"
    words = re.findall(rf"(?m)(?:^|[\s=(])((?:{top})/[\w./]+)", text)
    modules = re.findall(rf"-m ((?:{top})[.\w]*\w)", text)
    words += [f"{module.replace('.', '/')}.py" for module in modules]
    spans = re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", text))
    spans.append(text.partition("## Map")[2].partition("\n## ")[0])
    words += [word.lstrip("(").rstrip("),;.:") for span in spans for word in span.split()]
    found = set()
    for word in words:
        word = re.sub(r"(\.py):.*", r"\1", word.rpartition("=")[2])
        before, braces, rest = word.partition("{")
        inside, _, after = rest.partition("}")
        found |= {before + name + after for name in (inside.split(",") if braces else [""])}
    path = re.compile(
        r"(\.?[\w<>]+/)+([\w<>]+(\.\w+)*)?|[\w<>]+\.(py|md|json|svg|cfg|ya?ml|toml|sh)"
    )
    made = re.compile(r"runs/|build/|gdn|seqmodels/mixers/steady")  # by commands and who reads
    return {name for name in found if path.fullmatch(name) and not made.match(name)}


def is_path(name: str, page: Path) -> bool:
    """Whether a file or folder has this name: from the root, the page or a package on, or below."""
    pattern = re.sub(r"<\w+>", "*", name.rstrip("/"))
    packages = ("kernels_pallas", "seqmodels", "experiments", "configs")
    folders = [ROOT, page.parent, *(ROOT / package for package in packages)]
    attribute = pattern.rpartition(".")[0] or pattern  # module.function; configs go without .py
    tried = {pattern, f"{pattern}.py", f"{attribute}.py", f"{attribute}/__main__.py"}
    if any(list(folder.glob(each)) for folder in folders for each in tried):
        return True
    return any(list((ROOT / package).rglob(pattern)) for package in (*packages, "tests"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_lead_to_files(path):
    assert not [name for name in paths_named(path.read_text()) if not is_path(name, path)]


def test_a_path_that_is_gone_is_found():
    text = """`seqmodels/{loading,gone}.py` `ops/<operator>/case.py` `o_BTHV` `x / y` w/o
    python -m experiments.left --config=configs/small.py:gla
## Map

    dispatch/  lost/  {tiling,vjp}.py

## Letters"""
    named = paths_named(text)
    gone = {name for name in named if not is_path(name, ROOT / "README.md")}
    assert gone == {"seqmodels/gone.py", "experiments/left.py", "lost/"}
    assert {"seqmodels/loading.py", "configs/small.py", "dispatch/", "vjp.py"} <= named - gone


def test_readme_and_workspace_are_pleasant_to_read():
    for name in ("README.md", "WORKSPACE.md"):
        lines = (ROOT / name).read_text().split("\n")
        assert not [line for line in lines if len(line) > 120]
    assert len(lines) <= 121, "WORKSPACE.md keeps to 120 lines"


def test_a_docstring_without_equations_is_named(monkeypatch):
    monkeypatch.setattr(mixers.mixer_class("gla"), "__doc__", "GLA.\n\nNo equations.")
    with pytest.raises(ValueError, match=r"gla.py: GLA's docstring needs equations"):
        make.described("gla")


@pytest.fixture
def steady(tmp_path, monkeypatch):
    """Returns the tutorial's mixer, registered as the tutorial says."""
    file, line, *_ = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.S)
    path = tmp_path / "steady.py"
    path.write_text(file)
    spec = importlib.util.spec_from_file_location("seqmodels.mixers.steady", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    ((name, entry),) = ast.literal_eval(f"{{{line}}}").items()
    monkeypatch.setitem(mixers._MIXERS, name, entry)
    return mixer_suite.Case(name)


def test_the_tutorials_mixer_passes_the_suite(steady):
    assert mixers.names().count("steady") == 1
    mixer_suite.check_consistency(steady)
    mixer_suite.check_state(steady)
