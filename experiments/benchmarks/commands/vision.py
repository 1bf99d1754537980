"""Trains digits with every mixer: accuracies beside softmax attention's and an MLP's, same budget.

    python -m experiments.bench vision
    python -m experiments.bench vision --only=mala,inline,attention --seeds=3
    python -m experiments.bench vision --steps=150 --argument=pixels --out=runs/vision_pixels

Runs are those of configs/digits.py:<mixer>. Every registered mixer takes part, causal ones in both
directions. What is done is kept in --out and not trained again. The table, tables.md, has of each
mixer the accuracy on the test images (mean and range over seeds), loss, parameters, and the median
time of a step; accuracy.png shows the accuracies as bars.
"""

from pathlib import Path

from absl import flags

from configs import digits
from experiments.benchmarks import report, vision
from experiments.launch import cli

_ONLY = flags.DEFINE_list("only", ["all"], "mixers or baselines; all: every one")
_SEEDS = flags.DEFINE_integer("seeds", 1, "runs of each mixer", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 0, "of each run; 0: the config's", lower_bound=0)
_ARGUMENT = flags.DEFINE_string("argument", "", "further arguments of the config, such as pixels")
_OUT = flags.DEFINE_string("out", str(vision.FOLDER), "folder for results")


def main(argv):
    cli.no_arguments(argv)
    names = cli.chosen("only", _ONLY.value, digits.names(), every="all")
    settings = {"argument": _ARGUMENT.value, "steps": _STEPS.value}
    rows = vision.run(names, _SEEDS.value, settings, cli.output_folder(Path(_OUT.value)))
    print(report.text_table(rows))
    print(f"results: {_OUT.value}")
