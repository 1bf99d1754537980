"""Times the operators, generation and compilation: ratios within one run, each implementation checked before its clock starts.

    python -m experiments.bench --op=delta_rule
    python -m experiments.bench --op=linear_attention --lengths=1024,4096 --decay=channel --dtype=bfloat16
    python -m experiments.bench --op=diagonal_scan --shape=rg_lru_2b
    python -m experiments.bench --op=generation,compile

Prints tables and whether the targets are met; writes result.json, tables.md and a picture each into --out. Exit code 1
if an implementation was wrong. Memory is the compiler's plan beside inputs and outputs, not a measurement.
"""

import dataclasses
import datetime
import functools
from collections.abc import Callable
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.benchmarks import (
    compile_time,
    generation,
    machine,
    operators,
    report,
    sweep,
)

OPS = (*operators.CASES, "generation", "compile")
DTYPES = ("float32", "bfloat16")

_OP = flags.DEFINE_list("op", ["all"], f"any of {', '.join(OPS)}, or all")
_LENGTHS = flags.DEFINE_list(
    "lengths", None, "T of the operators, tokens read of generation; default 256 ... 16384"
)
_DECAY = flags.DEFINE_list(
    "decay",
    ["none", "token", "channel"],
    f"of the matrix recurrences: any of {', '.join(operators.DECAYS)}",
)
_SHAPE = flags.DEFINE_string("shape", None, "a published shape, from kernels_pallas/<op>/shapes.py")
_SIZES = {
    letter: flags.DEFINE_integer(name, None, f"in place of the shape's {letter}", lower_bound=1)
    for letter, name in {"B": "batch", "H": "heads", "K": "key_dim", "V": "value_dim"}.items()
}
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "of the operators' inputs")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", None, "by name; default: all there are")
_PASSES = flags.DEFINE_list("passes", list(sweep.PASSES), f"any of {', '.join(sweep.PASSES)}")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "measurements of each program", lower_bound=1)
_SECONDS = flags.DEFINE_float(
    "seconds", 2.0, "a program that took so long is not measured again", lower_bound=0.0
)
_OUT = flags.DEFINE_string("out", None, "folder for results; default: runs/bench/<op>-<time>")


def main(argv):
    cli.no_arguments(argv)
    ops = OPS if _OP.value == ["all"] else _chosen("op", _OP.value, (*OPS, "all"))
    plans = [_plan(op) for op in ops]  # all mistakes are found before the first clock starts
    name = f"{'-'.join(_OP.value)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out = Path(_OUT.value or Path("runs/bench") / name)
    out.mkdir(parents=True, exist_ok=True)
    environment = machine.environment()
    print(machine.describe(environment))
    sections = []
    for measure in plans:
        section = measure(out, machine.describe(environment))
        sections.append(section)
        report.save(out, environment, sections)
        print(f"\n{report.text(section)}\n", flush=True)
    print(report.targets_text([target for section in sections for target in section.targets]))
    print(f"results: {out}")
    return 1 if any(section.wrong for section in sections) else 0


def _plan(op: str) -> Callable[[Path, str], report.Section]:
    """What is to be measured, as a function of the folder and the pictures' title. Raises UserError for bad flags."""
    lengths = _LENGTHS.value and tuple(_length(text) for text in _LENGTHS.value)
    if op == "compile":
        return functools.partial(compile_time.section, compile_time.Settings())
    if op == "generation":
        settings = generation.Settings(rounds=_ROUNDS.value)
        if lengths:
            settings = dataclasses.replace(settings, contexts=lengths)
        return functools.partial(generation.section, settings)
    case = operators.CASES[op]
    settings = sweep.Settings(
        dtype=_DTYPE.value,
        implementations=_implementations(op),
        passes=_chosen("passes", _PASSES.value, sweep.PASSES),
        rounds=_ROUNDS.value,
        seconds=_SECONDS.value,
    )
    decays = _chosen("decay", _DECAY.value, operators.DECAYS)
    variants = decays if case.variants == operators.DECAYS else case.variants
    if _SHAPE.value:
        shape, length, variant = operators.published(case, _SHAPE.value)
        settings = dataclasses.replace(settings, shape=shape, lengths=(length,))
        variants = (variant,)
    sizes = {letter: flag.value for letter, flag in _SIZES.items() if flag.value}
    settings = dataclasses.replace(settings, shape=dataclasses.replace(settings.shape, **sizes))
    if lengths:
        settings = dataclasses.replace(settings, lengths=lengths)
    return functools.partial(sweep.section, case, variants, settings)


def _length(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise cli.UserError(
            f"--lengths: {text!r} is not a positive integer; write them like --lengths=256,1024"
        )
    return int(text)


def _chosen(flag: str, values: list[str], choices: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if value not in choices:
            raise cli.UserError(f"--{flag}: unknown {value!r}; choose from {', '.join(choices)}")
    return tuple(values)


def _implementations(op: str) -> tuple[str, ...]:
    """Those of --implementations that the operator has; it is a mistake if it has none of them."""
    has = operators.CASES[op].implementations
    if _IMPLEMENTATIONS.value is None:
        return has
    everywhere = {name for case in operators.CASES.values() for name in case.implementations}
    wanted = [name for name in _IMPLEMENTATIONS.value if name in has or name not in everywhere]
    if not wanted:
        raise cli.UserError(
            f"--implementations: {op} has none of {', '.join(_IMPLEMENTATIONS.value)}; choose from {', '.join(has)}"
        )
    return _chosen("implementations", wanted, has)


if __name__ == "__main__":
    cli.run(main, config_from=None)
