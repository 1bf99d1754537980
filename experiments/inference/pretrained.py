"""Loads a run's model and tokenizer onto its mesh, and writes models in several layouts."""

from pathlib import Path

import jax
import jax.numpy as jnp

from configs import common
from experiments.data import default_config
from experiments.training import restore, run_record, steps
from experiments.training.checkpoints import Checkpoints, TrainState
from seqmodels import checkpoints_io, loading
from seqmodels.checkpoints_io import architectures, files, own_layout, runs, special_tokens
from seqmodels.loading import LoadedModel
from seqmodels.text import tokenizers

WORKDIR = "workdir"


def on_mesh(config, params, workdir: str) -> LoadedModel:
    """Returns a run's model and tokenizer, read from `workdir`, with parameters in any sharding."""
    found = runs.described(config.model.to_dict(), config.data.to_dict(), params, workdir)
    return loading.with_tokenizer(found, starts_documents=True)


def load_run(config, workdir: str, step: int | None = None) -> LoadedModel:
    """Returns a run's model with its tokenizer and a checkpoint's parameters, on the config's mesh.

    That mesh may differ from training's. (`seqmodels.load` reads a run onto one device.)

    step: which checkpoint to read; None is the latest.
    Raises ValueError where the run's data is not text.
    """
    if "tokenizer" not in config.data:
        raise ValueError(
            f"the run's data, {config.data.name!r}, is not text: there is nothing to generate"
        )
    config = restore.reading_config(config)
    program = steps.build(config, config.data.seq_len)
    _, params = restore.evaluation_params(program, config, Path(workdir), step)
    return on_mesh(config, params, workdir)


def layouts() -> list[str]:
    """Returns the names of the layouts of weights that `write` supports, such as "llama"."""
    return [WORKDIR, own_layout.MODEL_TYPE, *architectures.names()]


def write(
    found: checkpoints_io.Pretrained,
    layout: str,
    out: Path,
    *,
    dtype: str | None = None,
    tokenizer: str = "",
    max_shard_bytes: int = files.MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes a model and its tokenizer into the folder `out`; returns the paths of the files.

    layout: "workdir" (a run, to be trained further), "seqmodels" (our own), or a model_type such as
      "llama", whose files other libraries read.
    dtype: of the weights, except those that models keep in float32, such as decays. None keeps each
      one's own; for a run, that of the weights it began from. In a workdir weights are float32.
    tokenizer: path of a tokenizer file, or "bytes", for a model without a tokenizer.
    max_shard_bytes: largest size of one file of weights.

    Raises ValueError, before anything is written, for a tokenizer that does not fit the model.
    """
    if layout == WORKDIR:
        loaded = loading.with_tokenizer(found, tokenizer)
        return [write_workdir(out, loaded), out / "config.json"]
    found = loading.with_given_tokenizer(found, tokenizer)
    hf_config, path = dict(found.hf_config), found.tokenizer_path
    if layout != own_layout.MODEL_TYPE and not path and loading.is_of_bytes(found):
        # Other programs read bytes by a tokenizer.json.
        path = special_tokens.keep(tokenizers.bytes_as_file(), found.tokens)
        hf_config["document_token"] = loading.WHOLE_TEXT
    return checkpoints_io.save_pretrained(
        out,
        found.model_config,
        found.params,
        architecture=layout,
        dtype=dtype or found.dtypes,
        hf_config=hf_config,
        tokenizer_path=path,
        tokens=found.tokens,
        max_shard_bytes=max_shard_bytes,
    )


def write_workdir(workdir: Path, loaded: LoadedModel) -> Path:
    """Writes a model as a run at step 0, which train, evaluate and generate read.

    Returns the checkpoint's folder. The run's config has this model and tokenizer, AdamW at 1e-5,
    and python_stdlib as data; every field can be overridden. Parameters are float32, whatever they
    were stored in: an update is smaller than what bfloat16 can add to most of them. Activations
    keep the model's dtype, and a later export the stored dtypes. Raises ValueError if `workdir`
    holds a run.
    """
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} holds a run already; give another folder")
    workdir.mkdir(parents=True, exist_ok=True)
    # The run's config: this model, this tokenizer.
    config = common.get_config()
    config.model = loaded.config | {"param_dtype": "float32"}
    config.data = default_config("python_stdlib")
    name = loaded.tokenizer_name
    if loaded.found.tokenizer_path is not None:
        name = str(workdir.absolute() / special_tokens.TOKENIZER_FILE)
    config.data.update({"tokenizer": name, "document_token": loaded.document_token})
    config.optimizer.learning_rate = 1e-5
    if positions := loaded.model.learned_positions:
        config.data.seq_len = min(config.data.seq_len, positions)
        config.sample.length = min(config.sample.length, positions)
    steps.build(config, config.data.seq_len)  # raises for what cannot be run
    # Its files: what is known of tokens, the checkpoint, the stored dtypes, and last the config.
    special_tokens.write(workdir, loaded.found.tokens, loaded.found.tokenizer_path)
    checkpoints = Checkpoints(workdir)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), loaded.params)
    checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, ()), NothingRead())
    checkpoints.close()
    run_record.write_json(workdir / runs.STORED_DTYPES, dict(loaded.found.dtypes))
    run_record.save_config(workdir, config)
    return checkpoints.path(0)


class NothingRead:
    """Data iterator whose state is empty: the position at the start of a run, for any dataset."""

    def get_state(self):
        return {}
