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
