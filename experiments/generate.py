"""Continues a prompt with the latest checkpoint of a run, as a stream.

    python -m experiments.generate --workdir=runs/quickstart-20261121-120000 --prompt="def " --length=300 --temperature=0.8

The prompt is read in one call; then each token costs the same time and the same memory, however much was read, in stacks of recurrent
and windowed layers. An empty prompt starts a new document. Generation ends early where the model starts another document.
"""

from pathlib import Path

from absl import flags

from experiments import cli, restore, sampling, steps
from experiments.data.tokenizers import make_tokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a training run")
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
_PROMPT = flags.DEFINE_string("prompt", "", "text to continue")
_LENGTH = flags.DEFINE_integer("length", 300, "tokens to generate at most", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token")
_TOP_K = flags.DEFINE_integer("top_k", None, "sample among the k most likely tokens only")
_TOP_P = flags.DEFINE_float(
    "top_p", None, "sample among the fewest tokens of this probability only"
)
_SEED = flags.DEFINE_integer("seed", 0, "another seed, another text")


def main(argv):
    cli.no_arguments(argv)
    config = flags.FLAGS.config
    if "tokenizer" not in config.data:
        raise cli.UserError(
            f"the run's data, {config.data.name!r}, is not text: there is nothing to generate"
        )
    tokenizer = make_tokenizer(config.data.tokenizer, config.data.document_token)
    program = steps.build(config, config.data.seq_len)
    _, params = restore.evaluation_params(program, config, Path(_WORKDIR.value), _STEP.value)
    tokens = sampling.stream_tokens(
        program.model,
        params,
        sampling.prompt_tokens(_PROMPT.value, tokenizer),
        _LENGTH.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        stop_token=tokenizer.document_id,
    )
    print(_PROMPT.value, end="", flush=True)
    for text in sampling.stream_text(tokens, tokenizer):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.run(main, config_from="workdir")
