"""The config of a run's workdir: to train a converted model, or to run a run again elsewhere.

python -m experiments.train --config=configs/workdir.py:runs/smollm2 --workdir=runs/smollm2
"""

from experiments.training import run_record


def get_config(workdir: str):
    return run_record.load_config(workdir)
