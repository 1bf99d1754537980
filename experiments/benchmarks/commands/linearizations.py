"""Tabulates linearizations of one teacher, and plots what decoding costs.

    python -m experiments.bench linearizations --teacher=gguf:smollm2 --argument=smollm
    python -m experiments.bench linearizations --teacher=runs/teacher --argument=small \\
        --methods=window,liger,liger:ungated --workdir=runs/small

Each method is a config of configs/linearize, or config:argument, and is run as
`experiments.linearize` does, into a folder of its own. What is done is read again, and a run that
was stopped goes on. The table, table.md and table.json, has of the teacher and of each student

    perplexity        of held-out text that none was trained on
    transfer          the converted layers' error on the teacher's hidden states, held out:
                      |student - teacher|^2 / |teacher|^2
    map KL            of linear attention's weights there from softmax attention's, where a student
                      has such weights
    trained           parameters of the largest stage
    tokens            read in all stages
    tokens/s, state   decoding one sequence after 1k, 8k and 32k tokens of context, and its state's
                      bytes

decoding.png has time and memory against the context, where there are several.
"""

from absl import flags

from experiments.launch import cli
from experiments.linearization import comparison

METHODS = "window,liger,lolcats,hedgehog,lawcat,mmmamba,gated_delta_net"

_TEACHER = flags.DEFINE_string("teacher", "gguf:smollm2", "see configs/linearize/common.py")
_METHODS = flags.DEFINE_string(
    "methods",
    METHODS,
    "configs of configs/linearize with commas between them; arguments after a colon, with + "
    "between them",
)
_ARGUMENT = flags.DEFINE_string(
    "argument", "", "of all configs, such as smollm, small, gpu or tiny"
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/linearizations", "where everything goes")
_CONTEXTS = flags.DEFINE_list("contexts", ["1024", "8192", "32768"], "tokens of context, rising")
_BATCHES = flags.DEFINE_integer("transfer_batches", 2, "for the column transfer", lower_bound=1)
_SCALE = flags.DEFINE_float("steps_scale", 1.0, "of the configs' steps", lower_bound=0.0)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 0, "tokens a row; 0: the configs' own", lower_bound=0)


def main(argv):
    cli.no_arguments(argv)
    workdir = cli.output_folder(_WORKDIR.value)
    contexts = tuple(cli.numbers("contexts", _CONTEXTS.value))

    def change(config):
        if _SEQ_LEN.value:
            config.data.seq_len = _SEQ_LEN.value
        for stage in config.linearize.stages.values():
            stage.steps = max(1, round(stage.steps * _SCALE.value))

    rows = comparison.compare(
        _TEACHER.value,
        [name.replace("+", ",") for name in _METHODS.value.split(",")],
        workdir,
        argument=_ARGUMENT.value,
        contexts=contexts,
        transfer_batches=_BATCHES.value,
        change=change,
    )
    print(comparison.table(rows, contexts))
