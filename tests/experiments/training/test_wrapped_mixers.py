"""An encoder of wrapped mixers with MD-TPE, on a mesh, through the trainer: steps and a resume."""

import json
import math
import shutil

import pytest

from tests.experiments import called

pytest.importorskip("sklearn")  # the extra [vision], whose digits these are

INNER = "bidirectional(mixer='hgrn2(expand_ratio=8)', combine='mean')"
FIELDS = {
    "model.pattern": f"ordered(mixer={INNER!r}, order='hilbert', group=8) + lightnet_nd + lightnet",
    "model.position_embedding": "md_tpe",
    "model.d_model": 16, "model.d_ff": 16, "model.num_layers": 3, "data.batch_size": 8,
    "data.eval_batch_size": 8, "schedule.warmup_steps": 0, "train.steps": 4, "train.log_every": 1,
    "train.eval_every": 4, "train.eval_batches": 1, "train.test_batches": 1,
    "checkpoint.every": 2, "checkpoint.keep": 2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_trains_and_resumes(number, tmp_path):
    """Whole images on one device; packed ones with rows, time and heads split over eight."""
    own = ({"mesh.data": 1}, {"mesh.data": 2, "mesh.seq": 2, "mesh.tensor": 2, "data.pack": 2})
    flags = [f"--config.{name}={value}" for name, value in (FIELDS | own[number]).items()]
    whole, again = tmp_path / "whole", tmp_path / "again"
    called.run("digits.py:linear_attention", whole, *flags)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "4")
    called.run("digits.py:linear_attention", again, *flags)
    first, second = (json.loads((w / "result.json").read_text()) for w in (whole, again))
    assert first["steps"] == 4 and math.isfinite(first["loss"])
    assert first["loss"] == second["loss"]
