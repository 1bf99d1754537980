"""Progressive distillation of a classifier into an ensemble of small students (Mamba PKD).

Seven students of growing size are trained one after the other, each on what the sum of those before
it lacks (`seqmodels.linearize.ensembles`, where the sources and what is from memory are told). A
budget takes the first few.

    python -m experiments.train --config=configs/digits.py:mamba --workdir=runs/teacher
    python -m experiments.linearize --config=configs/progressive.py:mamba \\
        --config.progressive.teacher=runs/teacher --workdir=runs/ensemble

    progressive.teacher    a run's folder
    progressive.kl, temperature, boost    of the loss
    progressive.members    member_1, member_2, ... in turn; each has the fields of config.model that
                           are its own

The other fields are those of configs/digits.py, whose first argument this config takes, too, and
say how each student is trained. Arguments: a mixer's name; tiny for two students and four steps.
"""

from ml_collections import ConfigDict

from configs import common, digits

WIDTHS = (4, 8, 12, 16, 20, 24, 32)


def get_config(arg: str = "mamba"):
    name, argument = digits.split_argument(arg)
    config = digits.get_config(name)
    members = {
        f"member_{i}": {"d_model": D, "d_ff": 2 * D, "num_layers": 1 if D < 16 else 2}
        for i, D in enumerate(WIDTHS, start=1)
    }
    fields = {"teacher": "", "kl": 1.0, "temperature": 1.0, "boost": 1.0, "members": members}
    config.progressive = ConfigDict(fields)
    config.train.steps = 300
    config.train.eval_every = 300
    return common.with_argument(config, argument, tiny=_tiny, pixels=digits.pixels)


def _tiny(config):
    members = config.progressive.members
    for name in list(members)[2:]:
        del members[name]
    config.train.update({"steps": 4, "log_every": 1, "eval_batches": 1, "test_batches": 1})
    config.checkpoint.every, config.schedule.warmup_steps = 2, 1
    config.data.update({"batch_size": 8, "eval_batch_size": 8})
