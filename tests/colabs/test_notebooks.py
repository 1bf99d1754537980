"""Every notebook runs from top to bottom, at smoke size."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "colabs").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("SEQMODELS_CONFIG_ARGUMENT", "smoke")
    monkeypatch.setenv("SEQMODELS_WORKDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), (
        "commit notebooks without outputs"
    )
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute(
        cwd=str(path.parents[1])
    )
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "bits per byte" in printed
    assert any(
        "image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", ())
    )
