"""Continues prompts with a run's latest checkpoint or a pretrained model.

    python -m experiments.generate --workdir=runs/quickstart-20261121-120000 --prompt="def " \
      --length=300 --temperature=0.8
    python -m experiments.generate --workdir=... --prompt="def " --prompt="class A" --stop=";" \
      --temperature=0
    python -m experiments.generate --model=gguf:smollm2 --chat --prompt="What is a state space?"

A single prompt's text is streamed; several prompts are continued together. The prompt is read
first; then, in stacks of recurrent and windowed layers, each token costs the same time and memory,
however long the text. An empty prompt starts a new document. Generation ends early where the model
ends its text or turn or starts another document, and before a stop string. --model takes what
`seqmodels.load` does; --chat puts the prompt into the model's chat template, also of a run that
`convert` made of such a model.
"""

from absl import flags
from ml_collections import ConfigDict

import seqmodels
from experiments.inference import pretrained
from experiments.launch import cli
from experiments.training import run_record
from seqmodels import loading

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a training run")
_MODEL = flags.DEFINE_string("model", None, "in place of a run: a folder, gguf:<file>, a hub name")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "with --model: a tokenizer.json, if it has none")
_CHAT = flags.DEFINE_bool("chat", False, "prompts are questions to an assistant")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, loading.DTYPES, "with --model: of the weights; default: the file's"
)
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
_PROMPT = flags.DEFINE_multi_string("prompt", [""], "text to continue; can be given several times")
_LENGTH = flags.DEFINE_integer("length", 300, "tokens to generate at most", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token")
_TOP_K = flags.DEFINE_integer("top_k", None, "sample among the k most likely tokens only")
_TOP_P = flags.DEFINE_float(
    "top_p", None, "sample among the fewest tokens of this probability only"
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "text to end before, such as '<|im_end|>'; can be given several times"
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "prompts continued together", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "another seed, another text")


def main(argv):
    cli.no_arguments(argv)
    loaded = _load()
    given = (_TEMPERATURE, _TOP_K, _TOP_P, _SEED, _STOP, _CHAT)
    options = {flag.name: flag.value for flag in given} | {"max_new_tokens": _LENGTH.value}
    shown = ["" if _CHAT.value else prompt for prompt in _PROMPT.value]
    if len(shown) == 1:
        pieces = loaded.generate(_PROMPT.value[0], stream=True, **options)
        print(shown[0], end="", flush=True)
        for text in pieces:
            print(text, end="", flush=True)
        print()
        return
    texts = loaded.generate(_PROMPT.value, batch_size=_BATCH_SIZE.value, **options)
    for number, (prompt, text) in enumerate(zip(shown, texts), start=1):
        print(f"{number} {'-' * 78}\n{prompt}{text}")


def _load() -> loading.LoadedModel:
    if bool(_MODEL.value) == bool(_WORKDIR.value):
        raise cli.UserError("give one of --workdir, of a training run, and --model")
    if _MODEL.value:
        return seqmodels.load(_MODEL.value, _TOKENIZER.value, dtype=_DTYPE.value)
    if _TOKENIZER.value or _DTYPE.value:
        raise cli.UserError("--tokenizer and --dtype go with --model")
    return pretrained.load_run(flags.FLAGS.config, _WORKDIR.value, _STEP.value)


def _config(flag) -> ConfigDict:
    return ConfigDict() if flag("model") else run_record.load_config(flag("workdir") or "")


if __name__ == "__main__":
    cli.run(main, config_from=_config)
