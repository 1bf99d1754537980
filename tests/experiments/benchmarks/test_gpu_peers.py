"""What the comparison on GPUs says and keeps, without a GPU."""

import json

import pytest

from experiments.benchmarks import gpu_peers, operators


def _rows(ours, attention):
    """Rows of one comparison and pass: milliseconds by length."""
    rows = gpu_peers.not_run(gpu_peers.COMPARISONS[0], ours)[::2]
    for row in rows:
        row["ms"] = {"triton": ours[row["T"]], "cudnn attention": attention[row["T"]]}
    return rows


def test_the_crossing_is_where_no_longer_length_is_slower():
    attention = {2048: 1.0, 4096: 2.0, 8192: 4.0}
    for ours, expected in (
        ({2048: 2.0, 4096: 1.0, 8192: 1.0}, "faster than cuDNN attention from T 4096 on"),
        ({2048: 0.5, 4096: 3.0, 8192: 1.0}, "faster than cuDNN attention from T 8192 on"),
        ({2048: 0.5, 4096: 1.0, 8192: 5.0}, "at no length, to the longest"),
    ):
        (line,) = gpu_peers.crossings(_rows(ours, attention))
        assert line.endswith(expected)
    (line, _) = gpu_peers.crossings(gpu_peers.not_run(gpu_peers.COMPARISONS[0], [2048]))
    assert line.endswith("not measured")


def test_what_was_measured_is_not_replaced_by_nothing(tmp_path):
    empty = gpu_peers.not_run(gpu_peers.COMPARISONS[0], [2048])
    gpu_peers.save(tmp_path, empty)
    assert "Not run: no GPU was at hand." in (tmp_path / "gpu_peers.md").read_text()
    gpu_peers.save(tmp_path, _rows({2048: 1.0}, {2048: 2.0}))
    with pytest.raises(ValueError, match="holds measurements: they stay as they are"):
        gpu_peers.save(tmp_path, empty)
    (kept,) = json.loads((tmp_path / "gpu_peers.json").read_text())["rows"]
    assert kept["ms"]["triton"] == 1.0


def test_what_cannot_run_says_why(monkeypatch):
    """Here neither side can, nor cuDNN: the row has no figure, and every reason."""
    monkeypatch.setattr(gpu_peers, "TOKENS", 32)
    monkeypatch.setattr(gpu_peers, "SHAPE", operators.Shape(H=1, K=4, V=4))
    forward, _ = gpu_peers.measure(gpu_peers.COMPARISONS[0], [32], 3, log=lambda text: None)
    assert forward["ms"] == {}
    assert "it is a kernel for gpu; this is cpu" in forward["notes"]["triton"]
    assert (
        forward["notes"]["fla"] == "not supported: fla is not installed: pip install -e '.[peers]'"
    )
    assert forward["notes"]["cudnn attention"].startswith("not run: softmax_attention")
