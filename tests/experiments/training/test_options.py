"""Trains with every field of a config as users do: by flags, some steps, and a resume.

Choices are read from the code's own registries, so a new choice is trained with. A new field fails
the first test until it has values here. A run takes a value of every field; together the runs take
all values, and each optimizer with microbatches, ZeRO, fsdp, offloading, and scanned layers or not.
"""

import itertools
import json
import math

import jax
import pytest
from ml_collections import ConfigDict

from configs import common
from experiments.training import optimizers, schedules, steps
from seqmodels import language_model, models, sharding
from seqmodels.modules import channel_mixers, stack
from tests.experiments import called

CONFIG = "mqar.py:linear_attention,smoke"
# A language model refuses those that see a token's neighbours.
PER_TOKEN = [name for name in channel_mixers.names() if not name.startswith("conv_")]
# float64 is refused unless JAX_ENABLE_X64 is set: tests/seqmodels/test_language_model.py.
CHOICES = {
    f"model.{name}": [choice for choice in choices if choice != "float64"]
    for name, choices in language_model.CHOICES.items()
} | {
    "model.channel_mixer": [None, *PER_TOKEN, "moe(num_experts=2, d_ff=8)"],
    "schedule.name": schedules.names(),
    "parallel.collective": sharding.COLLECTIVES,
}
NUMBERS = {
    "model.d_ff": [None, 24],
    "model.embedding_scale": [1.0, 4.0],
    "model.norm_eps": [1e-5, 1e-6],
    "model.learned_positions": [None, 32],
    "model.logit_softcap": [None, 30.0],
    "model.mixer_residual": [(1.0, 1.0), (0.5, 1.5)],
    "model.channel_residual": [(1.0, 1.0), (1.5, 0.5)],
    "model.vocab_size": [0, 520],
    "optimizer.learning_rate": [1e-3, 1e-2],
    "optimizer.b1": [0.9, 0.5],
    "optimizer.b2": [0.95, 0.99],
    "optimizer.eps": [1e-8, 1e-6],
    "optimizer.weight_decay": [0.0, 0.1],
    "optimizer.clip": [1.0, 0.0],
    "schedule.warmup_steps": [0, 2],
    "schedule.final_fraction": [0.1, 0.0],
    "schedule.decay_fraction": [0.1, 0.5],
    "schedule.power_a": [4.0, 2.0],
    "schedule.power_b": [-0.51, -0.4],
    "train.z_loss": [0.0, 1e-3],
}
SWITCHES = {
    f"model.{name}": [False, True]
    for name, (kind, _) in language_model.config_fields().items()
    if kind is bool and name != "scan_layers"
}
CYCLED = CHOICES | NUMBERS | SWITCHES
# What `runs` sets itself, and what says how long a run is.
SET = {
    "model": {"pattern", "num_layers", "d_model", "scan_layers"},
    "optimizer": {"name"},
    "schedule": set(),
    "parallel": {"zero", "offload", "microbatches", "split_backward"},
    "train": {
        "steps", "log_every", "eval_every", "eval_batches", "test_batches", "accumulate"
    },
}  # fmt: skip
SCANNED = [
    {"mesh.data": 2, "mesh.fsdp": 2, "mesh.seq": 2},
    {"mesh.data": 2, "mesh.fsdp": 2, "mesh.pipe": 2, "parallel.microbatches": 2},
    {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.seq": 2},
    {"mesh.fsdp": 4, "mesh.pipe": 2, "parallel.split_backward": True},
]
UNSCANNED = [{"mesh.data": 8}, {"mesh.data": 4, "mesh.seq": 2}]
SIZES = {"model.d_model": 16, "data.batch_size": 16, "data.seq_len": 32, "mesh.data": 1}
PATTERNS = ["linear_attention(num_heads=2)", "hgrn"]


def runs():
    """Returns {field: value} of each run: two per optimizer, more if a choice has more values."""
    names = optimizers.names()
    pairs = max(len(names), -(-max(map(len, CYCLED.values())) // 2))
    found = []
    for number in range(pairs):
        name = names[number % len(names)]
        zero = itertools.islice(itertools.cycle(sharding.ZERO_STAGES), number, number + 2)
        own = {"optimizer.name": name, "model.pattern": PATTERNS[number % len(PATTERNS)]}
        alone, scanned = (own | {"parallel.zero": stage} for stage in zero)
        scanned |= {"model.scan_layers": True, "model.num_layers": 2, "train.accumulate": 2}
        scanned |= SCANNED[number % len(SCANNED)]
        alone |= {"model.scan_layers": False, "model.num_layers": 1, "train.accumulate": 1}
        alone |= UNSCANNED[number % len(UNSCANNED)]
        alone["parallel.offload"] = name in optimizers.ELEMENTWISE
        found += [scanned, alone]
    for number, run in enumerate(found):
        for place, (field, values) in enumerate(CYCLED.items()):
            L = len(values)  # in an order of its own, so that fields with two values are not one
            run[field] = values[(number + number // L * (place % L)) % L]
    return [SIZES | run for run in found]


RUNS = runs()


def arguments(values):
    return [f"--config.{field}={value}" for field, value in values.items()]


def test_every_field_has_a_value_here():
    config = common.get_config()
    for section, own in SET.items():
        # Fields of other models have their values in test_architectures.py.
        names = language_model.config_fields() if section == "model" else config[section]
        assert {f"{section}.{name}" for name in names} == {
            *(field for field in CYCLED if field.startswith(f"{section}.")),
            *(f"{section}.{name}" for name in own if f"{section}.{name}" not in CYCLED),
        }
    for field, values in CYCLED.items():
        assert {run[field] for run in RUNS} == set(values)
    met = {(run["optimizer.name"], run["model.scan_layers"]) for run in RUNS}
    assert len(met) == 2 * len(optimizers.names())
    assert {run["parallel.zero"] for run in RUNS} == set(sharding.ZERO_STAGES)
    split = {run["optimizer.name"] for run in RUNS if run["parallel.zero"]}
    assert split == set(optimizers.names())
    used = {run["parallel.collective"] for run in RUNS if "mesh.seq" in run}
    assert used == set(sharding.COLLECTIVES)


def test_every_field_is_documented():
    told = common.__doc__ + sharding.Options.__doc__
    for section, fields in common.get_config().items():
        names = fields if isinstance(fields, ConfigDict) else ()
        assert not [name for name in (section, *names) if name not in told]
    for architecture in models.ARCHITECTURES:
        bases = models.model_class(architecture).__mro__
        told = " ".join(kind.__doc__ for kind in bases if issubclass(kind, stack.Stack))
        names = models.fields_of(architecture).keys() - {"pattern", "num_layers"}
        assert not [name for name in names if name not in told]


@pytest.mark.parametrize("number", range(0, 2 * len(optimizers.names()), 2))
def test_every_optimizers_state_is_laid_out(number):
    """Moments of stacked layers are split over the mesh, for every optimizer."""
    config = called.read(CONFIG, *arguments(RUNS[number] | {"model.vocab_size": 520}))
    state = steps.build(config, SIZES["data.seq_len"]).abstract_state
    assert all(leaf.sharding.mesh.size == 8 for leaf in jax.tree.leaves(state))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 3]
    assert moments and not any(leaf.sharding.is_fully_replicated for leaf in moments)


FAST = 2 * optimizers.names().index("muon") + 1


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=[] if number == FAST else pytest.mark.slow)
        for number in range(len(RUNS))
    ],
)
def test_trains_and_resumes_with(number, tmp_path):
    values = RUNS[number] | {"train.steps": 2}
    called.run(CONFIG, tmp_path, *arguments(values))
    called.run(CONFIG, tmp_path, *arguments(values | {"train.steps": 3}))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 3 and math.isfinite(result["loss"])
    first, second = json.loads((tmp_path / "run.json").read_text())
    assert (first["step"], second["step"]) == (0, 2)
    assert second["config_changes"] == ["config.train.steps: 2 -> 3"]
    saved = json.loads((tmp_path / "config.json").read_text())
    for field, value in values.items():
        section, name = field.split(".")
        if field not in ("train.steps", "model.vocab_size"):
            assert saved[section][name] == (list(value) if isinstance(value, tuple) else value)
