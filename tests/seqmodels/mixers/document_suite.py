"""The checks that `test_mixers.py` runs over registered mixers with `causal = False`.

Such a mixer sees whole documents, has no state, and may have a grid. Cases, parameters and training
are those of `mixer_suite`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import language_model, mixers
from tests.seqmodels.mixers import mixer_suite
from tests.seqmodels.mixers.mixer_suite import (
    ERROR_BFLOAT16,
    ERROR_FLOAT32,
    B,
    Case,
    D,
    T,
    assert_close,
    normal,
)

ROWS = np.array([2, 0, 3, 1])  # an order of the batch's rows
ALONE = (20, 9, 6, 5, 1)  # lengths of the documents that are also run alone: each is compiled


def padded_ids(case: Case):
    """Returns the ids of `mixer_suite.segment_ids`, the third row's last document as padding."""
    segment_ids_BT = np.array(mixer_suite.segment_ids(case))
    last_T = segment_ids_BT[2] == segment_ids_BT[2].max()
    segment_ids_BT[2, last_T] = 0
    return segment_ids_BT


def documents(segment_ids_BT) -> list[tuple[int, slice]]:
    """Returns (row, its tokens) of each document that is not padding."""
    found = []
    for row, segment_ids_T in enumerate(segment_ids_BT):
        for i in sorted(set(segment_ids_T.tolist()) - {0}):
            (index_N,) = np.nonzero(segment_ids_T == i)
            found.append((row, slice(index_N[0], index_N[-1] + 1)))
    return found


def check_documents(case: Case):
    """Checks that an output depends on all of its own document and on nothing else.

    A packed row gives what each document gives alone. Other documents and padding, whatever they
    hold, change no bit; the place of a row in the batch changes nothing. Where the mixer says that
    it uses no positions, tokens of a document may change places. bfloat16 is compared, too.
    """
    mixer, layer, segment_ids_BT = case.make(), case.layer(), padded_ids(case)
    found = documents(segment_ids_BT)
    alone = {n: [d for d in found if d[1].stop - d[1].start == n] for n in ALONE}
    # One document of each row is kept when the others change: its second, or the only one.
    kept = [[tokens for r, tokens in found if r == row][:2][-1] for row in range(B)]
    x_BTD, other_BTD = (np.array(normal(B, T, D, seed=seed)) for seed in (1, 2))
    changed_BTD = 10.0 * other_BTD
    for row, tokens in enumerate(kept):
        changed_BTD[row, tokens] = x_BTD[row, tokens]
    # The order of a row's tokens: each document's are reversed.
    order_BT = np.tile(np.arange(T), (B, 1))
    for row, tokens in found:
        order_BT[row, tokens] = order_BT[row, tokens][::-1]
    rows = np.arange(B)[:, None]

    @jax.jit
    def run(params, x_BTD):
        apply = functools.partial(mixer.apply, {"params": params}, layer=layer)
        inputs = x_BTD, changed_BTD, x_BTD[ROWS], x_BTD[rows, order_BT]
        ids = segment_ids_BT, segment_ids_BT, segment_ids_BT[ROWS], segment_ids_BT
        y_BTD, _ = apply(jnp.concatenate(inputs), jnp.concatenate(ids))
        y_alone = {
            n: apply(jnp.stack([x_BTD[row, tokens] for row, tokens in these]))[0]
            for n, these in alone.items()
            if these
        }
        low, _ = case.make(dtype=jnp.bfloat16).apply(
            {"params": params}, x_BTD, segment_ids_BT, layer=layer
        )
        return jnp.split(y_BTD, 4), y_alone, low

    params = mixer_suite.random_params(case)
    (packed, changed, permuted, shuffled), y_alone, low = run(params, x_BTD)
    packed = np.asarray(packed)
    for n, y_NTD in y_alone.items():
        expected = np.stack([packed[document] for document in alone[n]])
        assert_close(expected, y_NTD, ERROR_FLOAT32, f"packed, against {n} tokens alone")
    for row, tokens in enumerate(kept):
        same = np.array_equal(packed[row, tokens], changed[row, tokens])
        assert same, f"row {row}: another document or padding is seen"
    assert_close(permuted, packed[ROWS], 1e-5, "rows in another order")
    if not mixer.uses_positions:
        for row, tokens in found:
            limit = ERROR_FLOAT32
            assert_close(shuffled[row, tokens][::-1], packed[row, tokens], limit, "tokens reversed")
    assert low.dtype == jnp.bfloat16
    valid_BT = segment_ids_BT > 0
    difference = np.asarray(low, np.float32)[valid_BT] - packed[valid_BT]
    rms = np.sqrt(np.mean(np.square(difference)) / np.mean(np.square(packed[valid_BT])))
    assert rms < ERROR_BFLOAT16, f"bfloat16: {rms:.1e}"


def check_gradients(case: Case):
    """Checks that gradients are finite and reach earlier and later tokens of one document only."""
    found_BT, same_BT, t = mixer_suite.found_gradients(case, mixer_suite.segment_ids(case))
    assert not np.any(found_BT & ~same_BT), "another document is seen"
    start = np.flatnonzero(same_BT[0])[0]
    assert found_BT[0, start:t].any(), "no earlier token is seen"
    assert found_BT[0, t + 1 :].any(), "no later token is seen"


def check_stateless(case: Case):
    """Checks that a mixer returns no state and refuses one, and that language models refuse it."""
    mixer, refusal = case.make(), f"{case.name} sees whole documents and has no state"
    x_BTD = jnp.zeros((1, mixer_suite.document_length(case) or 4, D))

    def apply(params, state):
        return mixer.apply({"params": params}, x_BTD, None, state, layer=case.layer())

    params = jax.eval_shape(lambda: mixer_suite.initial_params(case))
    y_BTD, state = jax.eval_shape(apply, params, None)
    assert state is None and y_BTD.shape == x_BTD.shape
    with pytest.raises(ValueError, match=refusal):
        jax.eval_shape(apply, params, jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match=refusal):
        mixer.init_state(B)
    config = {"vocab_size": 8, "d_model": D, "num_layers": 1, "pattern": case.name}
    causal = ", ".join(mixers.causal_names())
    with pytest.raises(ValueError, match=f"{case.name} sees whole documents.*{causal}"):
        language_model.from_config(config)
