"""Reproduces published claims at a size that two CPU cores finish.

    python -m experiments.claims                       all of them: three hours on two cores
    python -m experiments.claims --only=parity,mqar    some
    python -m experiments.claims --smoke               each in seconds: does it run? Nothing is kept
    python -m experiments.claims --list                their names, and what each takes
    python -m experiments.claims --only=mqar --judge   verdict and picture of what is kept, anew

Results are kept in experiments/reports/claims and pictures in docs/claims; docs/claims.md is made
of them after every run. A claim that fails stays, marked as failed; that is no error of this
program. Trained runs stay in --workdir, where they are found by their configs: an interrupted
command goes on, and claims share baselines. After a change of the code give another --workdir.
"""

import sys
import traceback
from pathlib import Path

import jax
from absl import flags

from experiments import claims
from experiments.claims import gallery, kept
from experiments.claims.context import Context
from experiments.launch import cli

_ONLY = flags.DEFINE_list("only", [], "names of claims with commas between them; default: all")
_SMOKE = flags.DEFINE_bool("smoke", False, "shrink every claim to seconds; nothing is judged")
_LIST = flags.DEFINE_bool("list", False, "print the claims' names and titles")
_JUDGE = flags.DEFINE_bool("judge", False, "judge and draw kept measurements, without a run")
_WORKDIR = flags.DEFINE_string("workdir", "runs/claims", "where trained runs are kept and found")
_OUT = flags.DEFINE_string("out", None, "one folder for results and pictures, not the kept ones")


def main(argv):
    cli.no_arguments(argv)
    names = cli.chosen("only", _ONLY.value, claims.names()) or tuple(claims.names())
    if _LIST.value:
        print("\n".join(map(gallery.line, names)))
        return
    if not jax.config.jax_compilation_cache_dir:  # seeds, and later runs, compile once
        folder = cli.output_folder(Path(_WORKDIR.value) / "compiled")
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    keeping = not (_OUT.value or _SMOKE.value)
    out = Path(_OUT.value or Path(_WORKDIR.value) / "smoke")
    folders = (kept.RESULTS, kept.PICTURES) if keeping else (out, out)
    failures = []
    for name in names:
        try:
            if _JUDGE.value:
                record = kept.judged(name, kept.read(name, folders[0]))
            else:
                claim = claims.load(name)
                record = kept.make(name, Context(_WORKDIR.value, claim.seeds, _SMOKE.value))
            kept.write(record, *folders)
            print(kept.summary(record), flush=True)
        except Exception:  # the other claims still run
            traceback.print_exc()
            failures.append(name)
    if keeping:
        gallery.write()
    if failures:
        sys.exit(f"error: not measured: {', '.join(failures)}")


if __name__ == "__main__":
    cli.run(main, config_from=None)
