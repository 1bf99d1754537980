"""Linear-time sequence models in Flax: mixers, blocks, language models and their sharding.

import seqmodels
model = seqmodels.load("gguf:smollm2")
print(model.generate("The capital of France is", max_new_tokens=20))
for text in model.generate("What is a state space?", chat=True, stream=True):
    print(text, end="", flush=True)
"""


def load(source, tokenizer: str = "", **options):
    """Returns a model with its tokenizer, `seqmodels.loading.LoadedModel`: `generate` and `score`.

    source: a folder with config.json and safetensors, "gguf:<file>" ("gguf:smollm2" is the file of
      the extra [smollm]), a hub name such as "HuggingFaceTB/SmolLM2-135M" (extra [hub]), or the
      folder of a run of `experiments.train` (extra [train]).
    tokenizer: the path of a tokenizer.json, or "bytes", in place of the one that the source brings.
    dtype: float32, bfloat16 or float16, of parameters and activations; None is the files' own, or
      that of a run's activations. Activations of a float16 model are float32.
    max_len: tokens that full-attention layers can hold when generating; None is the context.
    step: which checkpoint of a run; None is the latest.
    Other options are those of `checkpoints_io.load_pretrained`.

    Raises ValueError for a source that is not there, or holds no model that can be built, and where
    there is no tokenizer, or it is another model's.
    """
    from seqmodels import loading  # Flax takes seconds to import

    return loading.load(source, tokenizer, **options)
