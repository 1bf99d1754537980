"""Weights from any source to a folder that other programs read, to our own layout, or to a run to go on from.

    python -m experiments.convert --source=gguf:SmolLM2-135M-Instruct.Q4_1.gguf --to=workdir --out=runs/smollm2
    python -m experiments.convert --source=folder_or_hub_name --to=seqmodels --out=exported --dtype=bfloat16
    python -m experiments.convert --source=runs/quickstart-20261121-120000 --to=llama --out=exported

Sources: a folder with config.json and safetensors, gguf:<file>, a hub name such as HuggingFaceTB/SmolLM2-135M, or the workdir of a
run (its latest checkpoint). Layouts: "workdir", with which train (--config=configs/workdir.py:runs/smollm2), evaluate and generate
go on; "seqmodels", which holds every model of ours; or a model_type such as llama, where that layout can say what the model is.
"""

import resource
import time
from pathlib import Path

import jax
from absl import flags

from experiments import cli, pretrained, restore, run_record, steps
from experiments.data import tokenizers
from seqmodels import checkpoints_io
from seqmodels.checkpoints_io import architectures, files, own_layout

_LAYOUTS = ["workdir", own_layout.MODEL_TYPE, *architectures.names()]
_SOURCE = flags.DEFINE_string("source", None, "where the weights come from", required=True)
_OUT = flags.DEFINE_string("out", None, "the folder to write", required=True)
_TO = flags.DEFINE_enum("to", own_layout.MODEL_TYPE, _LAYOUTS, "the layout to write")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "of the weights; default: the source's"
)
_MAX_LEN = flags.DEFINE_integer(
    "max_len",
    None,
    "tokens that full-attention layers can hold when decoding; default: the model's context",
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "a tokenizer.json, where the source has none")
_SHARD_BYTES = flags.DEFINE_integer(
    "shard_bytes", files.MAX_SHARD_BYTES, "a file's size at most", lower_bound=1
)


def main(argv):
    cli.no_arguments(argv)
    started = time.perf_counter()
    found = _find(_SOURCE.value)
    leaves = jax.tree.leaves(found.params)
    print(f"{_SOURCE.value}: {sum(leaf.size for leaf in leaves):,} parameters, {_dtypes(leaves)}")
    print(f"  {found.model_config['num_layers']} layers: {found.model_config['pattern']}")
    out = Path(_OUT.value)
    if _TO.value == "workdir":
        loaded = pretrained.with_tokenizer(found, _TOKENIZER.value)
        written = [pretrained.write_workdir(out, loaded), out / "config.json"]
    else:
        written = checkpoints_io.save_pretrained(
            out,
            found.model_config,
            found.params,
            architecture=_TO.value,
            dtype=_DTYPE.value,
            hf_config=found.hf_config,
            tokenizer_path=_TOKENIZER.value or found.tokenizer_path,
            max_shard_bytes=_SHARD_BYTES.value,
        )
    for path in written:
        print(f"  wrote {path}, {_size(path):,} bytes")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  {time.perf_counter() - started:.1f} s, {peak:.2f} GiB of memory at most")


def _find(source: str) -> checkpoints_io.Pretrained:
    if (Path(source) / "checkpoints").is_dir():
        return _of_run(Path(source))
    return checkpoints_io.load_pretrained(source, dtype=_DTYPE.value, max_len=_MAX_LEN.value)


def _of_run(workdir: Path) -> checkpoints_io.Pretrained:
    """What a run's latest checkpoint holds."""
    config = run_record.load_config(workdir)
    program = steps.build(config, config.data.get("seq_len", 8))
    _, params = restore.evaluation_params(program, config, workdir)
    tokenizer = config.data.get("tokenizer")
    is_file = tokenizer not in (None, tokenizers.BYTES)
    kept = {"model_type": own_layout.MODEL_TYPE}
    if tokenizer is not None:
        kept |= {"document_token": config.data.document_token}
        kept |= {} if is_file else {"tokenizer": tokenizer}
    return checkpoints_io.Pretrained(
        config.model.to_dict(), params, kept, str(workdir), Path(tokenizer) if is_file else None
    )


def _dtypes(leaves) -> str:
    return " and ".join(sorted({leaf.dtype.name for leaf in leaves}))


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


if __name__ == "__main__":
    cli.run(main, config_from=None)
