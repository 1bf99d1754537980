"""Mixers of positions, blocks, points and videos through the one trainer, with a resume."""

import json
import math
import shutil

import pytest

from tests.experiments import called

pytest.importorskip("sklearn")  # the extra [vision], whose digits these are

SMALL = {
    "model.d_model": 16, "model.d_ff": 16, "model.num_layers": 2, "data.batch_size": 8,
    "data.eval_batch_size": 8, "schedule.warmup_steps": 0, "train.steps": 4, "train.log_every": 1,
    "train.eval_every": 4, "train.eval_batches": 1, "train.test_batches": 1,
    "checkpoint.every": 2, "checkpoint.keep": 2, "mesh.data": 8,
}  # fmt: skip
RUNS = {
    "positions": (
        "digits.py:mlp_mixer",
        "mlp_mixer(hidden=8) + sparse_mlp(num_experts=2, capacity_factor=1.0, loss_weight=0.1)",
        {},
    ),
    "positions_packed": (
        "digits.py:mlp_mixer,pack",
        "sparse_mlp(num_experts=2, re_represent=False) + shallow_ffn(size='m', num_heads=2)",
        {},
    ),
    "positions_causal": (
        "digits.py:mlp_mixer",
        "bidirectional(mixer='sparse_mlp_causal(num_experts=2, max_length=16, expand=2)') + "
        "bidirectional(mixer=\"shallow_ffn_causal(size='m', max_length=4)\")",
        {},
    ),
    "blocks": (
        "digits_denoise.py:sparse_linear",
        "sparse_linear(block_size=2, topk=0.3, feature_map='relu', num_heads=2) + "
        "sparse_linear(block_size=4, mode='sparse_only', rope_base=None)",
        {},
    ),
    "points": (
        "digits.py:lion,points",
        "lion(mixer='hgrn', group=4, window=3) + lion(mixer='hgrn', depth=2, share=0.3, "
        "direction='y', shift=True)",
        {},
    ),
    "videos": (
        "moving_digits.py:mate",
        "mate(mixer='hgrn', window=(2, 2, 2), review=5) + mate(mixer='hgrn', window=None, "
        "scan='zigzag', review=None)",
        {"data.eval_examples": 16},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_trains_and_resumes_bit_for_bit(name, tmp_path):
    config, pattern, changes = RUNS[name]
    values = SMALL | changes | {"model.pattern": pattern}
    flags = [f"--config.{field}={value}" for field, value in values.items()]
    whole, again = tmp_path / "whole", tmp_path / "again"
    called.run(config, whole, *flags)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "4")
    called.run(config, again, *flags)
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, again)]
    assert results[1]["steps"] == 4 and math.isfinite(results[1]["loss"])
    assert results[0]["loss"] == results[1]["loss"]
