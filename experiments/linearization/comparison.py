"""Compares linearizations of one teacher: each runs in its own folder, and all are scored alike."""

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.data import make_dataset
from experiments.launch import cli
from experiments.linearization import decoding, run, teachers
from experiments.training import evaluation, loop, run_record, steps
from seqmodels.checkpoints_io import Pretrained
from seqmodels.linearize import transfer

TEACHER = "teacher"
# Of `transfer.losses`: the columns that show them.
_COLUMNS = {"relative": "transfer", "attention_map_kl": "map_kl"}
_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "linearize"


def compare(
    teacher: str,
    methods: list[str],
    workdir: Path,
    *,
    argument: str = "",
    contexts: tuple[int, ...] = (1024, 8192, 32768),
    transfer_batches: int = 2,
    change=lambda config: None,
    devices=None,
) -> dict[str, dict]:
    """Runs and scores linearizations of one teacher; returns name -> scores, also the teacher's.

    They are also written to workdir/table.json and table.md. Scores written there before are read,
    and interrupted runs are resumed.

    teacher: as in `teachers.load`.
    methods: names of configs in configs/linearize, with arguments of their own, as "liger:hgrn2".
    argument: further config argument of all methods, such as "smollm".
    contexts: context lengths at which decoding is measured.
    transfer_batches: test batches over which distances of layers are averaged.
    change: function that edits each method's config in place.
    """
    # Load every config, and fit it to the teacher, before the first run: mistakes show at once.
    rows, configs = {}, {TEACHER: _config(methods[0], argument)}
    configs |= {name: _config(name, argument) for name in methods}
    loaded = None
    for name, config in configs.items():
        config.linearize.teacher = teacher
        config.sample.length = 0
        change(config)
        if not (_folder(workdir, name) / "row.json").exists() and name != TEACHER:
            loaded = loaded or teachers.load(teacher, teachers.overrides(config))
            try:
                run.make_plan(config, loaded.model)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    del loaded
    for name, config in configs.items():
        folder = _folder(workdir, name)
        path = folder / "row.json"
        if path.exists():
            rows[name] = json.loads(path.read_text())
            measured = tuple(row["context"] for row in rows[name]["decoding"])
            if measured != tuple(contexts):
                raise ValueError(
                    f"{path} was measured at contexts {measured}, not {tuple(contexts)}: remove it, or take another --workdir"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            if name == TEACHER:
                rows[name] = _teacher_row(config, contexts, devices)
            else:
                rows[name] = _student_row(config, folder, contexts, transfer_batches, devices)
            run_record.write_json(path, rows[name])
        print(f"{name}: perplexity {rows[name]['perplexity']:.3f}", flush=True)
    run_record.write_json(workdir / "table.json", rows)
    run_record.write_text(workdir / "table.md", table(rows, contexts))
    if len(contexts) > 1:
        decoding.picture({n: row["decoding"] for n, row in rows.items()}, workdir / "decoding.png")
    return rows


def _folder(workdir: Path, name: str) -> Path:
    return workdir / name.replace(":", "-").replace(",", "-")


def _config(name: str, argument: str):
    method, _, own = name.partition(":")
    arguments = ",".join(filter(None, [own, argument]))
    return cli.load_config(f"{_CONFIGS / method}.py" + (arguments and f":{arguments}"))


def _teacher_row(config, contexts, devices):
    teacher = teachers.load(config.linearize.teacher, teachers.overrides(config))
    return _scores(teachers.with_data(config, teacher), teacher, contexts, devices)


def _student_row(config, folder, contexts, transfer_batches, devices):
    result = run.linearize(config, folder, devices)
    student = teachers.load(result["student"], {})
    teacher = teachers.load(config.linearize.teacher, teachers.overrides(config))
    config = teachers.with_data(config, teacher)
    return _scores(config, student, contexts, devices) | {
        **transfer_errors(config, teacher, student, transfer_batches),
        "trained": result["trained_parameters"],
        "tokens": result["tokens"],
        "pattern": result["pattern"],
    }


def _scores(config, found: Pretrained, contexts, devices) -> dict:
    """Returns a model's perplexity on the test split, and its cost of decoding per context."""
    with config.unlocked():
        config.model = type(config)(found.model_config)
    test_set = make_dataset(config.data, "test")
    program = steps.build(loop.resolve(config, test_set), config.data.seq_len, devices)
    params = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding),
        found.params,
        program.abstract_state.params,
    )
    scores = evaluation.evaluate(program, params, test_set, config.train.test_batches)
    return {
        "perplexity": scores.totals()["perplexity"],
        "decoding": decoding.measure(found.model_config, found.params, contexts),
    }


def transfer_errors(config, teacher, student, num_batches: int) -> dict[str, float]:
    """Returns mean distances per token between converted layers of student and teacher.

    They are averaged over the first `num_batches` batches of the test split.
    """
    model = transfer.make_model(teacher.model, student.model)
    both = transfer.params(model, (teacher.model, teacher.params), (student.model, student.params))

    @jax.jit
    def sums(params, batch):
        found = transfer.losses(model, params, batch)
        shown = {to: found[name] for name, to in _COLUMNS.items() if name in found}
        shown["tokens"] = jnp.ones(batch["inputs"].shape)
        return {name: jnp.sum(x_BT * batch["loss_mask"]) for name, x_BT in shown.items()}

    batches = itertools.islice(make_dataset(config.data, "test"), num_batches)
    totals = [jax.device_get(sums(both, batch)) for batch in batches]
    total = {name: sum(float(t[name]) for t in totals) for name in totals[0]}
    tokens = total.pop("tokens")
    return {name: value / tokens for name, value in total.items()}


def table(rows: dict[str, dict], contexts: tuple[int, ...]) -> str:
    """Returns the scores of `compare` as a Markdown table, a row per model."""
    at = [f"{context // 1024}k" if context >= 1024 else str(context) for context in contexts]
    head = ["", "perplexity", "transfer", "map KL", "trained", "tokens"]
    head += [f"tokens/s {c}" for c in at] + [f"state {c}" for c in at]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, row in rows.items():
        cells = [name, f"{row['perplexity']:.3f}"]
        cells += [f"{row[key]:.4g}" if key in row else "" for key in ("transfer", "map_kl")]
        cells += [f"{row[key]:,}" if key in row else "" for key in ("trained", "tokens")]
        cells += [f"{1 / r['seconds_per_token']:.1f}" for r in row["decoding"]]
        cells += [_bytes(r["state_bytes"]) for r in row["decoding"]]
        lines.append(cells)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _bytes(count: int) -> str:
    power = min(int(math.log(max(count, 1), 1000)), 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"
