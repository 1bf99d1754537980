"""Checks of a loaded model and of the files it is written to."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from seqmodels import checkpoints_io
from seqmodels.checkpoints_io import architectures, files


def check_tensors(theirs, ours) -> None:
    """The folders' files are byte-equal; where theirs keeps buffers, which ours leaves out, all
    other tensors are."""
    name = "model.safetensors"
    if (ours / name).read_bytes() == (theirs / name).read_bytes():
        return
    mine, others = (safetensors.numpy.load_file(folder / name) for folder in (ours, theirs))
    model_type = json.loads((ours / "config.json").read_text())["model_type"]
    ignored = architectures.get(model_type).ignored
    left_out = {k for k in others.keys() - mine.keys() if any(re.fullmatch(p, k) for p in ignored)}
    others = {k: v for k, v in others.items() if k not in left_out}
    assert others.keys() == mine.keys()
    for key, value in others.items():
        assert (value.dtype, value.tobytes()) == (mine[key].dtype, mine[key].tobytes()), key


def check_bytes(theirs, ours, architecture):
    """What is loaded and written again in the dtypes it had is the same file, to the byte; what was
    loaded."""
    loaded = checkpoints_io.load_pretrained(theirs)
    checkpoints_io.save_pretrained(
        ours,
        loaded.model_config,
        loaded.params,
        architecture=architecture,
        dtype=loaded.dtypes,
    )
    assert (ours / files.SINGLE_FILE).read_bytes() == (theirs / files.SINGLE_FILE).read_bytes()
    return loaded


def check_steps(loaded, tokens_BT, whole_BTW, prefill: int = 9) -> None:
    """A prefill, then token by token, each with the state of the last: the logits of the whole."""
    model = loaded.model

    @jax.jit
    def step(tokens_BT, state):
        return model.apply({"params": loaded.params}, tokens_BT, None, state)

    logits_BTW, state = step(tokens_BT[:, :prefill], model.init_state(tokens_BT.shape[0]))
    found = [logits_BTW]
    for t in range(prefill, tokens_BT.shape[1]):
        logits_BTW, state = step(tokens_BT[:, t : t + 1], state)
        found.append(logits_BTW)
    found_BTW = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found_BTW, whole_BTW, atol=1e-4 * float(whole_BTW.std()), rtol=0)
