"""Continues prompts with the latest checkpoint of a run: one as a stream, several together.

    python -m experiments.generate --workdir=runs/quickstart-20261121-120000 --prompt="def " --length=300 --temperature=0.8
    python -m experiments.generate --workdir=... --prompt="def " --prompt="class A" --stop=";" --temperature=0

The prompt is read first; then each token costs the same time and the same memory, however much was read, in stacks of recurrent
and windowed layers. An empty prompt starts a new document. Generation ends early where the model starts another document, or
before a stop string.
"""

from pathlib import Path

from absl import flags

from experiments import cli, restore, sampling, steps
from experiments.data.tokenizers import make_tokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a training run")
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
_PROMPT = flags.DEFINE_multi_string("prompt", [""], "text to continue; can be given several times")
_LENGTH = flags.DEFINE_integer("length", 300, "tokens to generate at most", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token")
_TOP_K = flags.DEFINE_integer("top_k", None, "sample among the k most likely tokens only")
_TOP_P = flags.DEFINE_float(
    "top_p", None, "sample among the fewest tokens of this probability only"
)
_STOP = flags.DEFINE_multi_string("stop", [], "text to end before; can be given several times")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "prompts continued together", lower_bound=1)
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
    _tell(program.model, params, tokenizer)


def _tell(model, params, tokenizer) -> None:
    prompts = [sampling.prompt_tokens(prompt, tokenizer) for prompt in _PROMPT.value]
    options = {
        "temperature": _TEMPERATURE.value,
        "top_k": _TOP_K.value,
        "top_p": _TOP_P.value,
        "seed": _SEED.value,
    }
    if len(prompts) == 1:
        tokens = sampling.stream_batch(model, params, prompts, _LENGTH.value, **options)
        print(_PROMPT.value[0], end="", flush=True)
        for _, text in sampling.stream_texts(tokens, tokenizer, 1, _STOP.value):
            print(text, end="", flush=True)
        print()
        return
    texts = sampling.generate(
        model,
        params,
        tokenizer,
        prompts,
        _LENGTH.value,
        batch_size=_BATCH_SIZE.value,
        stop=_STOP.value,
        **options,
    )
    for number, (prompt, text) in enumerate(zip(_PROMPT.value, texts), start=1):
        print(f"{number} {'-' * 78}\n{prompt}{text}")


if __name__ == "__main__":
    cli.run(main, config_from="workdir")
