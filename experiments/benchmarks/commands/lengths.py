"""Times whole-document linear attention against softmax attention over length, in one run.

    python -m experiments.bench lengths
    python -m experiments.bench lengths --lengths=64,256,1024 --heads=6 --key_dim=64 --value_dim=64

Both see all tokens, in both directions: `kernels_pallas.document_sums`, and
`kernels_pallas.softmax_attention` with causal=False in its chunked form, which never holds all
weights. Each is checked against its float64 definition first; then all programs are timed in turn.
Memory is the compiler's plan beside inputs and outputs (compiled.memory_analysis), a compiled
figure and not a measurement. Then a sequence of --blocks blocks is read block by block, each seeing
itself and all earlier ones; what is held between blocks is a measurement, the state's own bytes.

Writes result.json, tables.md and lengths.png into --out. Exit code 1 if a result was wrong.
"""

import dataclasses
import json

from absl import flags

from experiments.benchmarks import lengths, machine, pictures, report
from experiments.launch import cli

_DEFAULTS = lengths.Settings()
_LENGTHS = flags.DEFINE_list("lengths", [str(T) for T in _DEFAULTS.lengths], "T, rising")
_SIZES = {
    letter: flags.DEFINE_integer(name, getattr(_DEFAULTS.shape, letter), letter, lower_bound=1)
    for letter, name in {"B": "batch", "H": "heads", "K": "key_dim", "V": "value_dim"}.items()
}
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "of q, k and v")
_ROUNDS = flags.DEFINE_integer("rounds", _DEFAULTS.rounds, "of each program", lower_bound=3)
_SECONDS = flags.DEFINE_float(
    "seconds", _DEFAULTS.seconds, "a program that took so long is not measured again", 0.0
)
_BLOCKS = flags.DEFINE_integer("blocks", _DEFAULTS.blocks, "of the stream", lower_bound=2)
_BLOCK_SIZE = flags.DEFINE_integer("block_size", _DEFAULTS.block_size, "tokens", lower_bound=1)
_OUT = flags.DEFINE_string("out", "experiments/reports/lengths_vision", "folder for results")


def main(argv):
    cli.no_arguments(argv)
    settings = dataclasses.replace(
        _DEFAULTS,
        shape=dataclasses.replace(
            _DEFAULTS.shape, **{letter: flag.value for letter, flag in _SIZES.items()}
        ),
        lengths=tuple(sorted(cli.numbers("lengths", _LENGTHS.value))),
        dtype=_DTYPE.value,
        rounds=_ROUNDS.value,
        seconds=_SECONDS.value,
        blocks=_BLOCKS.value,
        block_size=_BLOCK_SIZE.value,
    )
    out = cli.output_folder(_OUT.value)
    environment = machine.environment()
    print(machine.describe(environment), flush=True)
    rows, checks = lengths.rows(settings)
    stream, error = lengths.stream(settings)
    shape = settings.shape
    sizes = f"B {shape.B}, H {shape.H}, K {shape.K}, V {shape.V}, {settings.dtype}"
    size, held = settings.block_size, sorted({row["state_bytes"] for row in stream})
    notes = [
        *lengths.growth(rows),
        "temp MiB: what the compiled program plans for beside inputs and outputs, not measured",
        f"{settings.blocks} blocks of {size} tokens: the state holds "
        f"{', '.join(f'{x:,}' for x in held)} bytes after every block (softmax attention's keys and "
        f"values: {stream[0]['keys_and_values_bytes']:,} to "
        f"{stream[-1]['keys_and_values_bytes']:,}); largest error of all outputs against one pass: "
        f"{error:.1e} of their rms",
    ]
    result = {"environment": environment, "settings": dataclasses.asdict(settings)}
    result |= {"checks": checks, "rows": rows, "stream": stream, "stream_error": error}
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    table = lengths.table(rows)
    title = f"{sizes} | {environment['device']}, {environment['cores']} cores"
    if rows:
        pictures.lengths(rows, stream, out / "lengths.png", title)
    text = [
        "# Linear against softmax attention over whole documents",
        "Written by `python -m experiments.bench lengths`.",
        machine.describe(environment),
        sizes,
        "\n".join(f"- {note}" for note in notes),
        report.markdown_table(table) if table else "nothing was timed",
        "![lengths](lengths.png)",
    ]
    (out / "tables.md").write_text("\n\n".join(text) + "\n")
    print("\n".join([*notes, report.text_table(table) if table else ""]))
    print(f"results: {out}")
    limit = lengths.correctness.tolerance(settings.dtype)
    return 1 if any(check["wrong"] for check in checks) or not error < limit else 0
