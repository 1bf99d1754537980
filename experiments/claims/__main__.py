"""Reproduces published claims at a size that two CPU cores finish.

    python -m experiments.claims                       all of them: three hours on two cores
    python -m experiments.claims --only=parity,mqar    some; "missing": those without a result
    python -m experiments.claims --smoke               each in seconds: does it run? Nothing is kept
    python -m experiments.claims --list                their names, and what each takes
    python -m experiments.claims --only=mqar --judge   verdict and picture of what is kept, anew
    python -m experiments.claims --gallery             docs/claims.md, of all that is kept

Results are kept in experiments/reports/claims and pictures in docs/claims. A claim that fails
stays, marked as failed; that is no error of this program. Trained runs stay in --workdir, where
they are found by their configs: an interrupted command goes on, and claims share baselines. After a
change of the code give another --workdir.
"""

import sys
from pathlib import Path

from absl import flags

from experiments.claims import gallery, runner
from experiments.launch import cli

_ONLY = flags.DEFINE_list("only", [], "names of claims with commas between them; default: all")
_SMOKE = flags.DEFINE_bool("smoke", False, "shrink every claim to seconds; nothing is judged")
_LIST = flags.DEFINE_bool("list", False, "print the claims' names and titles")
_JUDGE = flags.DEFINE_bool("judge", False, "judge and draw kept measurements, without a run")
_GALLERY = flags.DEFINE_bool("gallery", False, "write docs/claims.md of kept results, and no more")
_WORKDIR = flags.DEFINE_string("workdir", "runs/claims", "where trained runs are kept and found")
_OUT = flags.DEFINE_string("out", None, "one folder for results and pictures, not the kept ones")


def main(argv):
    cli.no_arguments(argv)
    names = runner.chosen(_ONLY.value)
    if _LIST.value:
        print("\n".join(map(gallery.line, names)))
    elif _GALLERY.value:
        gallery.write()
    else:
        workdir = cli.output_folder(_WORKDIR.value)
        out = Path(_OUT.value or workdir / "smoke") if _OUT.value or _SMOKE.value else None
        if _JUDGE.value:
            missing = runner.judge(names, out)
        else:
            runner.compile_once(workdir / "compiled")
            missing = runner.run(names, workdir, _SMOKE.value, out)
        if missing:
            sys.exit(f"error: not measured: {', '.join(missing)}")


if __name__ == "__main__":
    cli.run(main, config_from=None)
