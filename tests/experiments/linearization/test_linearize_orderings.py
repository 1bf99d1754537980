"""The published orderings, on a small teacher trained here: about half an hour of one core.

The same table by hand: experiments/reports/linearize/make.sh, which also kept it there.
"""

import jax
import pytest

from configs import linearize_teacher
from experiments.linearization import comparison
from experiments.training import loop

pytestmark = pytest.mark.exhaustive
METHODS = [
    "liger",
    "liger:ungated",
    "window",
    "liger:no_window",
    "liger:feature_map",
    "liger:hybrid",
    "liger:half",
    "window:softmax",
    "lolcats",
    "lolcats:no_transfer",
    "hedgehog:map",
    "hedgehog:t2r,map",
    "hedgehog:elu_plus_one,map",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orderings")
    jax.config.update("jax_disable_most_optimizations", False)
    teacher = linearize_teacher.get_config()
    teacher.mesh.data = 1
    teacher.sample.length = 0
    loop.train(teacher, folder / "teacher", jax.devices()[:1])

    def one_device(config):
        config.mesh.data = 1

    return comparison.compare(
        str(folder / "teacher"),
        METHODS,
        folder / "table",
        argument="small",
        contexts=(1024,),
        change=one_device,
        devices=jax.devices()[:1],
    )


def perplexity(rows, *names):
    return [rows[name]["perplexity"] for name in names]


def test_liger_needs_its_parts(rows):
    """Full < ungated and window only < without the window << a learned feature map (Liger, arXiv
    2503.01496, table 6)."""
    full, ungated, window, no_window, feature_map = perplexity(
        rows, "liger", "liger:ungated", "window", "liger:no_window", "liger:feature_map"
    )
    assert full < min(ungated, window)
    assert max(ungated, window) < no_window
    assert no_window < feature_map


def test_attention_transfer_helps(rows):
    """At the same number of tokens (LoLCATs, arXiv 2410.10254, table 7)."""
    with_transfer, without = perplexity(rows, "lolcats", "lolcats:no_transfer")
    assert rows["lolcats"]["tokens"] == rows["lolcats:no_transfer"]["tokens"]
    assert with_transfer < without


def test_hedgehogs_map_is_nearer_to_softmax(rows):
    """In KL, on the same layers (Hedgehog, arXiv 2402.04347, figure 3)."""
    hedgehog, t2r, elu = (
        rows[name]["map_kl"]
        for name in ("hedgehog:map", "hedgehog:t2r,map", "hedgehog:elu_plus_one,map")
    )
    assert hedgehog < t2r
    assert hedgehog < elu


def test_quality_rises_with_the_softmax_layers_kept(rows):
    """Compares none, a quarter, half and all (mmMamba, arXiv 2502.13145, table 5)."""
    none, quarter, half, every = perplexity(
        rows, "liger", "liger:hybrid", "liger:half", "window:softmax"
    )
    assert every < half < quarter < none
