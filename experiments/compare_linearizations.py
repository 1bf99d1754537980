"""A table of linearizations of one teacher, and a picture of what decoding costs.

    python -m experiments.compare_linearizations --teacher=gguf:smollm2 --argument=smollm --workdir=runs/linearizations
    python -m experiments.compare_linearizations --teacher=runs/teacher --methods=window,liger,lolcats --workdir=/tmp/table

Each method is a config of configs/linearize, or config:argument, and is run by `experiments.linearize` into a folder of its own; what is
done is read again, and a run that was stopped goes on. The table, table.md and table.json, has of the teacher and of each student

    perplexity        of held-out text that none was trained on
    transfer          the converted layers' error on the teacher's hidden states, |student - teacher|^2 / |teacher|^2, held out
    map KL            there, of linear attention's weights from softmax attention's, where a student has such weights
    trained           parameters of the largest stage;   tokens: read in all stages
    tokens/s, state   decoding one sequence after 1k, 8k and 32k tokens of context, and its state's bytes

decoding.png has time and memory against the context, up to the largest of --contexts.
"""

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags, logging

from experiments import cli, evaluation, loop, run_record, steps
from experiments.data import make_dataset
from experiments.linearization import decoding, run, teachers
from seqmodels.linearize import transfer

_COLUMNS = {"relative": "transfer", "attention_map_kl": "map_kl"}
METHODS = ("window", "liger", "lolcats", "hedgehog", "lawcat", "mmmamba", "gated_delta_net")

_TEACHER = flags.DEFINE_string("teacher", "gguf:smollm2", "see configs/linearize/common.py")
_METHODS = flags.DEFINE_list(
    "methods", list(METHODS), "configs of configs/linearize: name or name:argument"
)
_ARGUMENT = flags.DEFINE_string(
    "argument", "", "an argument of all configs, such as smollm, gpu or tiny"
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/linearizations", "where everything goes")
_CONTEXTS = flags.DEFINE_list("contexts", ["1024", "8192", "32768"], "tokens of context, rising")
_BATCHES = flags.DEFINE_integer(
    "transfer_batches", 2, "of the test split, for the column transfer", lower_bound=1
)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 0, "tokens a row; 0: the configs' own")


def main(argv):
    cli.no_arguments(argv)
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    contexts = [int(context) for context in _CONTEXTS.value]
    rows = {}
    for name in ("teacher", *_METHODS.value):
        path = workdir / name.replace(":", "-") / "row.json"
        if path.exists():
            rows[name] = json.loads(path.read_text())
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows[name] = (_teacher_row if name == "teacher" else _student_row)(
                name, path.parent, contexts
            )
            run_record.write_json(path, rows[name])
        logging.info("%s: %s", name, rows[name])
        print(f"{name}: perplexity {rows[name]['perplexity']:.3f}", flush=True)
    run_record.write_json(workdir / "table.json", rows)
    text = table(rows, contexts)
    run_record.write_text(workdir / "table.md", text)
    decoding.picture({n: row["decoding"] for n, row in rows.items()}, workdir / "decoding.png")
    print(text)


def method_config(name: str):
    """The config of `--methods`' name, with the teacher and the common argument."""
    method, _, own = name.partition(":")
    argument = ",".join(filter(None, [own, _ARGUMENT.value]))
    config = cli.load_config(f"configs/linearize/{method}.py" + (argument and f":{argument}"))
    config.linearize.teacher = _TEACHER.value
    config.sample.length = 0
    if _SEQ_LEN.value:
        config.data.seq_len = _SEQ_LEN.value
    return config


def _teacher_row(name, folder, contexts):
    config = method_config(_METHODS.value[0])
    teacher = teachers.load(_TEACHER.value, {"remat": config.model.remat})
    return _scores(teachers.with_data(config, teacher), teacher, contexts)


def _student_row(name, folder, contexts):
    config = method_config(name)
    result = run.linearize(config, folder)
    student = teachers.load(result["student"], {})
    teacher = teachers.load(_TEACHER.value, {"remat": config.model.remat})
    config = teachers.with_data(config, teacher)
    return _scores(config, student, contexts) | {
        **transfer_errors(config, teacher, student),
        "trained": result["trained_parameters"],
        "tokens": result["tokens"],
        "pattern": result["pattern"],
    }


def _scores(config, found: teachers.Teacher, contexts) -> dict:
    """Perplexity on the test split, and what decoding costs."""
    with config.unlocked():
        config.model = type(config)(found.model_config)
    test_set = make_dataset(config.data, "test")
    program = steps.build(loop.resolve(config, test_set), config.data.seq_len)
    scores = evaluation.evaluate(program, found.params, test_set, config.train.test_batches)
    return {
        "perplexity": scores.totals()["perplexity"],
        "decoding": decoding.measure(found.model_config, found.params, contexts),
    }


def transfer_errors(config, teacher, student) -> dict[str, float]:
    """The columns `transfer` and `map KL`, over the first batches of the test split."""
    model = transfer.make_model(teacher.model, student.model)
    both = transfer.params(model, (teacher.model, teacher.params), (student.model, student.params))

    @jax.jit
    def sums(params, batch):
        found = transfer.losses(model, params, batch["inputs"], batch["segment_ids"])
        kept = {to: found[name] for name, to in _COLUMNS.items() if name in found}
        kept["tokens"] = jnp.ones(batch["inputs"].shape)
        return {name: jnp.sum(x_BT * batch["loss_mask"]) for name, x_BT in kept.items()}

    batches = itertools.islice(make_dataset(config.data, "test"), _BATCHES.value)
    totals = [jax.device_get(sums(both, batch)) for batch in batches]
    total = {name: sum(float(t[name]) for t in totals) for name in totals[0]}
    tokens = total.pop("tokens")
    return {name: value / tokens for name, value in total.items()}


def table(rows: dict[str, dict], contexts: list[int]) -> str:
    """Markdown."""
    at = [f"{context // 1024}k" if context >= 1024 else str(context) for context in contexts]
    head = ["", "perplexity", "transfer", "map KL", "trained", "tokens"]
    head += [f"tokens/s {c}" for c in at] + [f"state {c}" for c in at]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, row in rows.items():
        cells = [name, f"{row['perplexity']:.3f}"]
        cells += [f"{row[key]:.4f}" if key in row else "" for key in ("transfer", "map_kl")]
        cells += [f"{row[key]:,}" if key in row else "" for key in ("trained", "tokens")]
        cells += [f"{1 / r['seconds_a_token']:.1f}" for r in row["decoding"]]
        cells += [_bytes(r["state_bytes"]) for r in row["decoding"]]
        lines.append(cells)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _bytes(count: int) -> str:
    power = min(int(math.log(max(count, 1), 1000)), 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


if __name__ == "__main__":
    cli.run(main, config_from=None)
