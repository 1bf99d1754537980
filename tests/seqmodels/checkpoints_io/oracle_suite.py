"""What every architecture must pass, with transformers' PyTorch model as the oracle: in, logits,
out, and in again by them."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from seqmodels import checkpoints_io
from tests.seqmodels.checkpoints_io import round_trip
from tests.seqmodels.oracles import weights

T = 21


def check(
    oracle,
    folder,
    *,
    architecture: str | None = None,
    length: int = T,
    adjust=None,
    steps: bool = False,
):
    """`oracle`: a causal language model of transformers, tiny; its weights are made random here.
    Returns our Pretrained.

    adjust: called with the oracle to bring its random weights to where more of the definition is
      felt.
    steps: decode, too, and compare.
    """
    weights.randomize(oracle.eval())
    if adjust is not None:
        with torch.no_grad():
            adjust(oracle)
    theirs, ours = folder / "theirs", folder / "ours"
    oracle.save_pretrained(theirs)
    loaded = checkpoints_io.load_pretrained(theirs)
    tokens_BT = np.random.default_rng(0).integers(0, oracle.config.vocab_size, (2, length))
    expected_BTW = logits_of(oracle, tokens_BT)
    logits_BTW, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTW, expected_BTW, atol=1e-4 * expected_BTW.std(), rtol=0)
    if steps:
        round_trip.check_steps(loaded, tokens_BT, logits_BTW)

    checkpoints_io.save_pretrained(
        ours,
        loaded.model_config,
        loaded.params,
        architecture=architecture or oracle.config.model_type,
        hf_config=loaded.hf_config,
    )
    round_trip.check_tensors(theirs, ours)
    with torch.no_grad():
        again = type(oracle).from_pretrained(ours, dtype=torch.float32).eval()
    # The same weights; where they lie in memory decides how torch's matrix products sum.
    atol = 1e-5 * expected_BTW.std()
    np.testing.assert_allclose(logits_of(again, tokens_BT), expected_BTW, atol=atol, rtol=0)
    return loaded


def logits_of(oracle, tokens_BT) -> np.ndarray:
    with torch.no_grad():
        return oracle(torch.as_tensor(tokens_BT)).logits.numpy()
