"""Times the operators, generation and compilation: ratios within one run, each implementation
checked before its clock starts.

    python -m experiments.bench --op=delta_rule
    python -m experiments.bench --op=linear_attention --lengths=1024,4096 --decay=per_channel
    python -m experiments.bench --op=diagonal_scan --shape=rg_lru_2b --dtype=bfloat16
    python -m experiments.bench --op=generation,compile
    python -m experiments.bench tune --op=delta_rule --topology=v6e --shape=target,qwen3_next_80b

Prints tables and whether the targets are met; writes result.json, tables.md and a picture of each
into --out. Exit code 1 if an implementation was wrong. Memory is the compiler's plan beside inputs
and outputs, not a measurement.

`tune` looks for chunk and block sizes (`benchmarks/tune.py`), by static cycles on TPU topologies,
which needs no TPU (pip install -e '.[train,tpu]'), or by time on the device at hand, and writes
them into the table that the operators read, kernels_pallas/dispatch/tuned.json.
"""

import dataclasses
import datetime
import functools
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

from experiments.benchmarks import (
    compile_time,
    generation,
    machine,
    operators,
    report,
    static_cost,
    sweep,
    tune,
)
from experiments.launch import cli

OPS = (*operators.CASES, "generation", "compile")
DTYPES = ("float32", "bfloat16")

_OP = flags.DEFINE_list("op", ["all"], f"any of {', '.join(OPS)}, or all")
_LENGTHS = flags.DEFINE_list(
    "lengths", None, "T of the operators, tokens read of generation; default 256 ... 16384"
)
_DECAY = flags.DEFINE_list(
    "decay",
    ["none", "per_token", "per_channel"],
    f"of the matrix recurrences: any of {', '.join(operators.DECAYS)}",
)
_SHAPE = flags.DEFINE_string(
    "shape",
    None,
    "a published shape, from kernels_pallas/ops/<op>/shapes.py; for tune several, and target; "
    "default there: all",
)
_SIZES = {
    letter: flags.DEFINE_integer(name, None, f"in place of the shape's {letter}", lower_bound=1)
    for letter, name in {"B": "batch", "H": "heads", "K": "key_dim", "V": "value_dim"}.items()
}
_DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "of the operators' inputs; default: float32, for tune bfloat16"
)
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", None, "by name; default: all there are")
_PASSES = flags.DEFINE_list("passes", list(sweep.PASSES), f"any of {', '.join(sweep.PASSES)}")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "measurements of each program", lower_bound=1)
_SECONDS = flags.DEFINE_float(
    "seconds", 2.0, "a program that took so long is not measured again", lower_bound=0.0
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "folder for results; default: runs/bench/<op>-<time>, for tune kernels_pallas/dispatch",
)
_NOT_FOR_TUNE = ("lengths", "decay", "batch", "heads", "key_dim", "value_dim", "passes")
_TOPOLOGY = flags.DEFINE_list(
    "topology", None, "for tune: TPU parts (v5e, v5p, v6e, tpu7x) or slices; default: time here"
)


def main(argv):
    cli.no_arguments(argv)
    if _TOPOLOGY.value:
        raise cli.UserError("--topology: only tune compiles for one; for costs see tpu_report")
    ops = cli.chosen("op", _OP.value, OPS, every="all")
    measurements = [_measurement(op) for op in ops]  # finds all mistakes before a clock starts
    name = f"{'-'.join(_OP.value)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out = Path(_OUT.value or Path("runs/bench") / name)
    cli.output_folder(out)
    environment = machine.environment()
    print(machine.describe(environment))
    sections = []
    for measure in measurements:
        section = measure(out, machine.describe(environment))
        sections.append(section)
        report.save(out, environment, sections)
        print(f"\n{report.text(section)}\n", flush=True)
    print(report.targets_text([target for section in sections for target in section.targets]))
    print(f"results: {out}")
    return 1 if any(section.wrong for section in sections) else 0


def tune_main(argv) -> None:
    cli.no_arguments(argv)
    for name in _NOT_FOR_TUNE:
        if flags.FLAGS[name].value != flags.FLAGS[name].default:
            raise cli.UserError(f"--{name}: tune takes all calls of --shape; leave it out")
    ops = cli.chosen("op", _OP.value, tune.OPS, every="all")
    shapes = _SHAPE.value and tuple(_SHAPE.value.split(","))
    static_cost.known_shapes(ops, shapes or ())
    if _TOPOLOGY.value:
        jax.config.update("jax_platforms", "cpu")  # libtpu compiles; nothing runs on a TPU
        static_cost.check_topologies(_TOPOLOGY.value)
    implementations = tune.PLATFORMS["tpu" if _TOPOLOGY.value else jax.default_backend()]
    if _IMPLEMENTATIONS.value:
        implementations = cli.chosen("implementations", _IMPLEMENTATIONS.value, implementations)
    dtype, topologies = _DTYPE.value or "bfloat16", _TOPOLOGY.value or (None,)
    jobs = tune.jobs(ops, shapes, dtype, implementations, topologies)
    out = cli.output_folder(_OUT.value or tune.FOLDER)
    found = 0
    for each in tune.run(jobs, _ROUNDS.value, _SECONDS.value):
        found += 1
        print(f"{each.key}\n{report.text_table(tune.lines(each))}\n", flush=True)
        tune.save(out, [each])
    print(f"{found} entries: {out}")


def _measurement(op: str) -> Callable[[Path, str], report.Section]:
    """Returns a function (folder, picture title) -> Section that benchmarks `op` by the flags."""
    lengths = _LENGTHS.value and tuple(cli.numbers("lengths", _LENGTHS.value))
    if op == "compile":
        return functools.partial(compile_time.section, compile_time.Settings())
    if op == "generation":
        settings = generation.Settings(rounds=_ROUNDS.value)
        if lengths:
            settings = dataclasses.replace(settings, contexts=lengths)
        return functools.partial(generation.section, settings)
    case = operators.CASES[op]
    settings = sweep.Settings(
        dtype=_DTYPE.value or "float32",
        implementations=_implementations(op),
        passes=cli.chosen("passes", _PASSES.value, sweep.PASSES),
        rounds=_ROUNDS.value,
        seconds=_SECONDS.value,
    )
    decays = cli.chosen("decay", _DECAY.value, operators.DECAYS)
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


def _implementations(op: str) -> tuple[str, ...]:
    """Returns those of --implementations that `op` has (default: all); raises UserError if none."""
    has = operators.CASES[op].implementations
    if _IMPLEMENTATIONS.value is None:
        return has
    everywhere = {name for case in operators.CASES.values() for name in case.implementations}
    wanted = [name for name in _IMPLEMENTATIONS.value if name in has or name not in everywhere]
    if not wanted:
        given = ", ".join(_IMPLEMENTATIONS.value)
        raise cli.UserError(
            f"--implementations: {op} has none of {given}; choose from {', '.join(has)}"
        )
    return cli.chosen("implementations", wanted, has)
