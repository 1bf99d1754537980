"""Loads weights from runs of `experiments.train`.

A run's folder holds config.json, the resolved config it trains with, and checkpoints/<step>,
written by Orbax. Checkpoints are read onto one device, whatever the run trained on;
orbax-checkpoint (extra [train]) is imported when one is read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from seqmodels import language_model, models
from seqmodels.checkpoints_io import conversion, files, own_layout, special_tokens
from seqmodels.checkpoints_io.pretrained import Pretrained
from seqmodels.checkpoints_io.special_tokens import SpecialTokens
from seqmodels.text import tokenizers

# A file of runs that began from pretrained weights: `Pretrained.dtypes` of those.
STORED_DTYPES = "stored_dtypes.json"


def is_run(source: str | Path) -> bool:
    """Returns whether `source` is a folder of a run, one that has checkpoints."""
    return (Path(source).expanduser() / "checkpoints").is_dir()


def read_config(workdir: str | Path) -> dict[str, Any]:
    """Returns the content of a run's config.json; raises ValueError if the folder has none."""
    path = Path(workdir).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(f"{workdir} holds no run: there is no {path}")
    return files.read_json(path)


def load_run(
    workdir: str | Path, *, step: int | None = None, model_config: Mapping[str, Any] | None = None
) -> Pretrained:
    """Returns the model of a run's checkpoint, with the parameters to evaluate and sample with.

    workdir: the run's folder. step: the checkpoint's; None is the latest.
    model_config: config.model to read it with, such as with another param_dtype; None is the run's.

    Raises ValueError for a folder without such a checkpoint, a checkpoint of another model than the
    config's, and where orbax-checkpoint is not installed.
    """
    config = read_config(workdir)
    averaged = config.get("optimizer", {}).get("name") == "schedule_free"
    model_config = dict(config["model"] if model_config is None else model_config)
    checkpoint = _checkpoint(Path(workdir).expanduser() / "checkpoints", step)
    params = _read_params(checkpoint, model_config, averaged)
    return described(model_config, config["data"], params, str(workdir))


def described(
    model_config: Mapping[str, Any], data: Mapping[str, Any], params, workdir: str
) -> Pretrained:
    """Returns a Pretrained of a run's parameters, with the run's tokenizer and special tokens.

    data: the section "data" of the run's config. Files beside the tokenizer state the special
      tokens; where they do not, the run's document token begins and ends a text.
    """
    kept = {"model_type": own_layout.MODEL_TYPE}
    name, path, tokens = data.get("tokenizer"), None, SpecialTokens()
    if name is not None:
        kept["document_token"] = data["document_token"]
        if name == tokenizers.BYTES:
            kept["tokenizer"] = name
        else:
            path = Path(name).expanduser()
        start = tokenizers.make_tokenizer(name, data["document_token"]).document_id
        known = special_tokens.read(path.parent if path else Path(workdir).expanduser())
        tokens = known.filled(SpecialTokens(bos=start, eos=(start,)))
    stored = Path(workdir).expanduser() / STORED_DTYPES
    dtypes = files.read_json(stored) if stored.is_file() else {}
    own = models.own_fields(model_config)
    return Pretrained(own, params, kept, workdir, path, tokens, dtypes)


def _checkpoint(folder: Path, step: int | None) -> str:
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    return str((folder / str(chosen_step(folder, steps, step))).absolute())


def chosen_step(folder: Path, steps: Sequence[int], step: int | None) -> int:
    """Returns `step`, the last of `steps` for None. Raises ValueError where there is none such."""
    if not steps:
        raise ValueError(f"{folder} holds no checkpoint")
    if step is not None and step not in steps:
        raise ValueError(
            f"there is no checkpoint of step {step} in {folder}; there are {str(steps)[1:-1]}"
        )
    return steps[-1] if step is None else step


def _read_params(checkpoint: str, model_config: Mapping[str, Any], averaged: bool):
    """Reads a checkpoint's parameters; averaged: whether to return Schedule-Free's averages."""
    try:
        from orbax.checkpoint import v1 as ocp
    except ImportError as error:
        raise ValueError(
            "a run's checkpoints are read by orbax-checkpoint, which is not installed: "
            "pip install 'linear-seqmodels[train]'"
        ) from error
    shapes = nn.meta.unbox(conversion.boxed_params(language_model.from_config(model_config)))
    stored = ocp.metadata(checkpoint, checkpointable_name="params").metadata
    if _shapes(stored) != _shapes(shapes):
        raise ValueError(f"{checkpoint} is of another model than config.json describes")

    def read(**trees):
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        asked = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), trees
        )
        return ocp.load_checkpointables(checkpoint, asked)

    if not averaged:
        return read(params=shapes)["params"]
    # Training moves y = b1 x + (1 - b1) z and keeps z; x is evaluated (arXiv 2405.15682), computed
    # in the dtypes that were trained.
    training = ocp.metadata(checkpoint, checkpointable_name="training").metadata
    parts = read(params=stored, training=training)
    leaves = jax.tree.leaves(parts["training"], is_leaf=_is_schedule_free)
    state = next(filter(_is_schedule_free, leaves))

    @jax.jit
    def average(params, z, b1):
        return jax.tree.map(
            lambda y, z, leaf: ((y - (1.0 - b1) * z) / b1).astype(leaf.dtype), params, z, shapes
        )

    return average(parts["params"], state["z"], state["b1"])


def _is_schedule_free(node) -> bool:
    return isinstance(node, dict) and {"b1", "z", "weight_sum"} <= node.keys()


def _shapes(tree):
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)
