"""What every architecture must pass, with transformers' PyTorch model as the oracle: in, logits, out, and in again by them."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from seqmodels import checkpoints_io
from tests.seqmodels.oracles import weights

T = 21


def check(oracle, folder, *, architecture: str | None = None, length: int = T):
    """`oracle`: a causal language model of transformers, tiny; its weights are made random here. Returns our Pretrained."""
    weights.randomize(oracle.eval())
    theirs, ours = folder / "theirs", folder / "ours"
    oracle.save_pretrained(theirs)
    loaded = checkpoints_io.load_pretrained(theirs)
    tokens_BT = np.random.default_rng(0).integers(0, oracle.config.vocab_size, (2, length))
    expected_BTW = logits_of(oracle, tokens_BT)
    logits_BTW, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-4 * expected_BTW.std(), rtol=0)

    checkpoints_io.save_pretrained(
        ours,
        loaded.model_config,
        loaded.params,
        architecture=architecture or oracle.config.model_type,
        hf_config=loaded.hf_config,
    )
    name = "model.safetensors"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    with torch.no_grad():
        again = type(oracle).from_pretrained(ours, dtype=torch.float32).eval()
    np.testing.assert_array_equal(logits_of(again, tokens_BT), expected_BTW)
    return loaded


def logits_of(oracle, tokens_BT) -> np.ndarray:
    with torch.no_grad():
        return oracle(torch.as_tensor(tokens_BT)).logits.numpy()
