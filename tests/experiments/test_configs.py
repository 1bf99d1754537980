"""Every config describes a model that can be built, and every `:smoke` trains."""

import json

import jax
import jax.numpy as jnp
import pytest

from configs import (
    common,
    delta_net_340m,
    digits,
    digits_denoise,
    gated_delta_net_1300m,
    moving_digits,
    mqar,
    quickstart,
    selective_copying,
    small,
    state_tracking,
)
from experiments.data import make_dataset
from experiments.training import loop
from seqmodels import language_model, mixers, models

SMALL = [(small, name) for name in mixers.causal_names()]
OTHERS = [
    (quickstart, ""),
    (delta_net_340m, ""),
    (gated_delta_net_1300m, "hybrid"),
    (selective_copying, ""),
    (mqar, "delta_net,pairs8"),
    (state_tracking, "parity,delta_net_negative"),
    (state_tracking, "modular_arithmetic,mlstm"),
    (state_tracking, "word_problem,delta_product"),
]
VARIANTS = [
    (gated_delta_net_1300m, ""),
    *((mqar, name) for name in mqar.VARIANTS),
    *((state_tracking, f"parity,{name}") for name in state_tracking.VARIANTS),
]
VISION = [
    *((digits, name) for name in digits.names()),
    (digits, "full_attention,pixels"),
    (digits, "mala,pack"),
    (digits, "attention,points"),
    (digits, "gla,sequence"),
    (digits_denoise, "linear_attention"),
    (digits_denoise, "gla,pixels"),
    (digits_denoise, "mlp"),
    (moving_digits, "mala"),
    (moving_digits, "mlp,two,digit"),
    (moving_digits, "attention,denoise"),
]


def label(case):
    return f"{case[0].__name__.split('.')[-1]}:{case[1]}"


@pytest.mark.parametrize("case", SMALL + OTHERS + VARIANTS, ids=label)
def test_describes_a_model(case):
    module, argument = case
    config = module.get_config(*([argument] if argument else []))
    fields = config.model.to_dict()
    fields["vocab_size"] = fields["vocab_size"] or 257
    model = language_model.from_config(fields)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    expected = {delta_net_340m: 340e6, gated_delta_net_1300m: 1.3e9, quickstart: 1e6}
    if module in expected:
        assert abs(parameters / expected[module] - 1) < 0.25


@pytest.mark.parametrize("case", VISION, ids=label)
def test_describes_a_model_of_images(case):
    module, argument = case
    config = module.get_config(argument)
    config = loop.resolve(config, make_dataset(config.data, "train"))
    model = models.from_config(config.model)
    assert type(model).__name__.lower() == config.model.architecture.replace("_", "")
    assert model.d_model == 64
    if "sequence" not in argument:
        assert model.grid and model.num_classes and model.input_dim


def test_arguments_of_images():
    assert digits.get_config("pack").model.pattern == digits.pattern(digits.DEFAULT)
    assert digits.pattern("gla") == "bidirectional(mixer='gla')"
    assert digits.get_config("mamba2,sequence").model.pattern.startswith("mamba2(head_dim=16")
    with pytest.raises(ValueError, match="mala sees whole documents"):
        models.from_config(digits.get_config("mala,sequence").model.to_dict() | {"vocab_size": 17})
    assert digits.pattern("mamba2").startswith("bidirectional(mixer='mamba2(")
    with pytest.raises(ValueError, match="unknown config argument 'malla'; choose .*pixels.*smoke"):
        digits.get_config("malla")


# Students of linearizations are not trained from nothing but in tests.
STUDENTS = ("lawcat", "liger", "lolcats", "mmmamba", "selective")
# That a causal mixer is trained in both directions is shown by those of test_wrappers.py.
BOTH_WAYS = [(digits, name) for name in mixers.causal_names()]
# Options of the one form that inline and rala show; the mixers' suite trains each.
ONE_FORM = [
    (digits, name)
    for name in (
        "linfusion",
        "lit",
        "mala",
        "nalaformer",
        "pooling",
        "sana_video",
        "slab",
        "whole_document",
    )
]


def marked(case):
    elsewhere = case[1] in STUDENTS or case in BOTH_WAYS + ONE_FORM
    return pytest.param(case, marks=[pytest.mark.exhaustive] if elsewhere else [])


TRAINED = [marked(case) for case in SMALL + OTHERS + VISION]


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINED, ids=label)
def test_smoke_trains(case, tmp_path):
    module, argument = case
    config = module.get_config(
        f"{argument},smoke" if argument else "smoke" if module is not small else ""
    )
    if module is not quickstart:
        config.sample.length = 0  # decoding is each mixer's own test
    config.data.batch_size = 2
    loop.train(config, tmp_path, devices=jax.devices()[:1])  # several are test_loop's
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == config.train.steps == 4
    assert result["loss"] < 2 * jnp.log(config.model.vocab_size or 257)


def test_unknown_argument_lists_the_choices():
    with pytest.raises(ValueError, match="unknown config argument 'smok'; choose one of .*smoke"):
        quickstart.get_config("smok")
    with pytest.raises(ValueError, match="choose one of pairs8|choose one of attention"):
        mqar.get_config("transformer")


def test_smoke_asks_for_no_files():
    config = common.smoke(delta_net_340m.get_config())
    assert make_dataset(config.data, "train").vocab_size == 257
