"""Converts a model's weights to Hugging Face's layout, to our own, or to a run to train further.

    python -m experiments.convert --source=gguf:smollm2 --to=workdir --out=runs/smollm2
    python -m experiments.convert --source=folder_or_hub_name --to=seqmodels --out=exported \
      --dtype=bfloat16
    python -m experiments.convert --source=runs/quickstart-20261121-120000 --to=llama --out=exported

Sources are those of `seqmodels.load`, the workdir of a run among them (its latest checkpoint).
Layouts: "workdir", with which train (--config=configs/workdir.py:runs/smollm2), evaluate and
generate go on; "seqmodels", which holds every model of ours; or a model_type such as llama, if that
architecture can express the model.

The tokenizer is written too, with what its files say of tokens: which begin and end a text or a
turn, and the chat templates. A model of bytes gets a tokenizer.json of bytes in other programs'
layouts.

A run trains float32 parameters, whatever its source is stored in, and computes in the source's
dtype (float16 in float32). Exported again, each tensor has the dtype that it came in; --dtype sets
another for all but decays and the like, which stay float32.
"""

import resource
import time
from pathlib import Path

import jax
from absl import flags

from experiments.inference import pretrained
from experiments.launch import cli
from seqmodels import loading
from seqmodels.checkpoints_io import files, own_layout

_SOURCE = flags.DEFINE_string("source", None, "where the weights come from", required=True)
_OUT = flags.DEFINE_string("out", None, "the folder to write", required=True)
_TO = flags.DEFINE_enum("to", own_layout.MODEL_TYPE, pretrained.layouts(), "the layout to write")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    loading.DTYPES,
    "of weights, but of a workdir's (float32), and of its activations; default: the source's",
)
_MAX_LEN = flags.DEFINE_integer(
    "max_len",
    None,
    "tokens that full-attention layers can hold when decoding; default: the model's context",
    lower_bound=1,
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "a tokenizer.json, where the source has none")
_SHARD_BYTES = flags.DEFINE_integer(
    "shard_bytes", files.MAX_SHARD_BYTES, "a file's size at most", lower_bound=1
)


def main(argv):
    cli.no_arguments(argv)
    started = time.perf_counter()
    wide = {"param_dtype": "float32"} if _TO.value == pretrained.WORKDIR else None
    found = loading.find(_SOURCE.value, dtype=_DTYPE.value, max_len=_MAX_LEN.value, overrides=wide)
    leaves = jax.tree.leaves(found.params)
    dtypes = " and ".join(sorted({leaf.dtype.name for leaf in leaves}))
    print(f"{_SOURCE.value}: {sum(leaf.size for leaf in leaves):,} parameters, {dtypes}")
    print(f"  {found.model_config['num_layers']} layers: {found.model_config['pattern']}")
    written = pretrained.write(
        found,
        _TO.value,
        Path(_OUT.value),
        dtype=_DTYPE.value,
        tokenizer=_TOKENIZER.value,
        max_shard_bytes=_SHARD_BYTES.value,
    )
    for path in written:
        print(f"  wrote {path}, {_size(path):,} bytes")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  {time.perf_counter() - started:.1f} s, {peak:.2f} GiB of memory at most")


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


if __name__ == "__main__":
    cli.run(main, config_from=None)
