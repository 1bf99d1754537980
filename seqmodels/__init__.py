"""Linear-time sequence models in Flax: mixers, blocks, language models and their sharding.

import seqmodels
model = seqmodels.load("gguf:smollm2")
print(model.generate("The capital of France is", max_new_tokens=20))
for text in model.generate("What is a state space?", chat=True, stream=True):
    print(text, end="", flush=True)
"""


def load(source, tokenizer: str = "", **options):
    """Loads a language model with its tokenizer as a `seqmodels.loading.LoadedModel`.

    Its methods `generate` and `score` take texts.

    Args:
      source: a folder with config.json and safetensors, "gguf:<file>" ("gguf:smollm2" is the file
        of the extra [smollm]), a hub name such as "HuggingFaceTB/SmolLM2-135M" (extra [hub]), or
        the folder of a run of `experiments.train` (extra [train]).
      tokenizer: the path of a tokenizer.json, or "bytes"; "" takes the source's own.
      **options: dtype (float32, bfloat16 or float16, of parameters and activations; default: the
        files' own, or that of a run's activations; a float16 model computes in float32), max_len
        (tokens that full-attention layers can hold when generating; default: the context), step (a
        run's checkpoint; default: the latest), and others of `checkpoints_io.load_pretrained`.

    Raises:
      ValueError: a source that does not exist or holds no model that can be built, no tokenizer, or
        a tokenizer of another vocabulary.
    """
    from seqmodels import loading  # Flax takes seconds to import

    return loading.load(source, tokenizer, **options)
