"""Turns a softmax transformer into a linear-time model.

    python -m experiments.linearize --config=configs/linearize/liger.py:smollm --workdir=/tmp/liger
    python -m experiments.linearize --config=configs/linearize/lolcats.py \\
        --config.linearize.teacher=runs/teacher

Encoders and denoisers are converted as language models are (configs/linearize/lit.py,
shallow_ffn.py). Everything is written into --workdir: a folder per stage, and `student`, a run's
folder for `experiments.evaluate` and `experiments.generate`. The same command with the same
--workdir resumes from its last checkpoint.

configs/progressive.py distils a teacher into an ensemble of small students instead; each
has a run's folder.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments.launch import cli
from experiments.linearization import progressive, run
from experiments.training import run_record

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/linearize/<method>.py[:argument]"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where everything goes; default: runs/<config>-<time>"
)


def main(argv):
    cli.no_arguments(argv)
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    sections = {"linearize", progressive.SECTION} & set(_CONFIG.value)
    if not sections:
        raise cli.UserError(f"{path} is no linearization: it has no section `linearize`")
    workdir = Path(_WORKDIR.value or run_record.default_workdir(path))
    if progressive.SECTION in sections:
        print(progressive.text(progressive.progress(_CONFIG.value, workdir)))
        return
    result = run.linearize(_CONFIG.value, workdir)
    for name, stage in result["stages"].items():
        print(
            f"{name}: {stage['steps']} steps, {stage['parameters']:,} parameters trained, "
            f"test loss {stage['loss']:.4f}, perplexity {stage['perplexity']:.3f}"
        )
    print(f"student     {result['pattern']}\n            {result['student']}")


if __name__ == "__main__":
    cli.run(main)
