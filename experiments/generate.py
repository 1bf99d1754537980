"""Continues prompts with a language model, or draws images with a run's denoiser.

    python -m experiments.generate --workdir=runs/quickstart-20261121-120000 --prompt="def " \
      --length=300 --temperature=0.8
    python -m experiments.generate --workdir=... --prompt="def " --prompt="class A" --stop=";" \
      --temperature=0
    python -m experiments.generate --model=gguf:smollm2 --chat --prompt="What is a state space?"
    python -m experiments.generate --workdir=runs/digits_denoise-... --guidance=2 --steps=50

A single prompt's text is streamed; several prompts are continued together. The prompt is read
first; then, in stacks of recurrent and windowed layers, each token costs the same time and memory,
however long the text. An empty prompt starts a new document. Generation ends early where the model
ends its text or turn or starts another document, and before a stop string. --model takes what
`seqmodels.load` does; --chat puts the prompt into the model's chat template, also of a run that
`convert` made of such a model.

Of a run of images (a denoiser) samples of each class go to <workdir>/samples.png, of videos to
samples.gif, with a row for each class. --guidance above 1 makes them more typical of their class,
--steps are those of DDIM.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

import seqmodels
from experiments.inference import pretrained, subjects
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
_SEED = flags.DEFINE_integer("seed", 0, "another seed, another text or other images")
_SAMPLES = flags.DEFINE_integer("samples", 8, "images per class", lower_bound=1)
_CLASSES = flags.DEFINE_list("classes", [], "names of classes to draw; default: all")
_GUIDANCE = flags.DEFINE_float("guidance", 1.0, "weight of the class in each step; 1: none added")
_STEPS = flags.DEFINE_integer("steps", 50, "steps from noise to an image", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "path without ending; default: <workdir>/samples")

_OF_IMAGES = (_SAMPLES, _CLASSES, _GUIDANCE, _STEPS, _OUT)
_OF_TEXT = (
    *(_PROMPT, _LENGTH, _TEMPERATURE, _TOP_K, _TOP_P, _STOP, _BATCH_SIZE, _CHAT),
    *(_TOKENIZER, _DTYPE),
)


def main(argv):
    cli.no_arguments(argv)
    of_images = not _MODEL.value and not subjects.is_language_model(flags.FLAGS.config)
    _check_flags(_OF_TEXT if of_images else _OF_IMAGES, of_images)
    if of_images:
        from experiments.inference import image_samples  # drawing takes seconds to import

        path = image_samples.sample(
            flags.FLAGS.config,
            _WORKDIR.value,
            _STEP.value,
            classes=_CLASSES.value,
            count=_SAMPLES.value,
            sampling_steps=_STEPS.value,
            guidance=_GUIDANCE.value,
            seed=_SEED.value,
            out=Path(_OUT.value or f"{_WORKDIR.value}/samples"),
        )
        print(f"written: {path}")
        return
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


def _check_flags(unfit, of_images: bool) -> None:
    """Raises UserError if a flag was given that does not fit what is generated."""
    given = [flag.name for flag in unfit if flags.FLAGS[flag.name].present]
    if given and of_images:
        config = flags.FLAGS.config
        raise cli.UserError(
            f"--{given[0]} is of text, and the run's model is a {config.model.architecture} of "
            f"{config.data.name!r}: give {_names(_OF_IMAGES)}"
        )
    if given:
        raise cli.UserError(
            f"--{given[0]} is of images, and the model is a language model: give {_names(_OF_TEXT)}"
        )


def _names(known) -> str:
    return ", ".join(f"--{flag.name}" for flag in known)


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
