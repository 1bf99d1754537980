"""MD-TPE: sums along each axis by loops, causality along axes, packed documents."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.mixers import Layer
from seqmodels.modules.md_tpe import MDTPE

D, H = 6, 2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_loops(params, x_TD, places, axes):
    """x plus, along each axis, the projected norm of the decaying sum, in float64."""
    y_TD = np.array(x_TD, np.float64)
    for axis in range(axes):
        q_HK, k_HK = (np.asarray(params[f"{n}_{axis}"], np.float64) for n in "qk")
        decay_H = 1 / (1 + np.exp(-np.asarray(params[f"decay_{axis}"], np.float64)))
        state, o_TD = {}, np.zeros_like(y_TD)
        for t in sorted(range(len(places)), key=lambda t: places[t][axis]):
            line = tuple(np.delete(places[t], axis))
            state[line] = np.repeat(decay_H, D // H) * state.get(line, 0.0) + x_TD[t]
            o_TD[t] = np.repeat((q_HK * k_HK).sum(axis=1), D // H) * state[line]
        heads = o_TD.reshape(-1, H, D // H)
        heads /= np.sqrt(np.mean(np.square(heads), axis=-1, keepdims=True) + 1e-5)
        y_TD += o_TD @ np.asarray(params[f"o_{axis}"]["kernel"], np.float64)
    return y_TD


@pytest.mark.parametrize("grid", [None, (3, 4), (2, 3, 2)])
def test_sums_along_each_axis(grid):
    lengths, axes = (12, 5, 14), len(grid or (0,))
    ids_BT = np.repeat([1, 2, 3], lengths)[None]
    module, x_BTD = MDTPE(H, grid), normal(1, sum(lengths), D)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x_BTD, ids_BT))["params"]
    assert max(np.abs(params[f"o_{a}"]["kernel"]).max() for a in range(axes)) < 0.011
    params = jax.tree.map(lambda p: p + 0.3 * normal(*p.shape, seed=p.size), params)
    for axis in range(axes):
        params[f"norm_{axis}"]["scale"] = jnp.ones(D)
    found, first = jax.jit(module.apply)({"params": params}, x_BTD, ids_BT), 0
    for length in lengths:
        inner = (grid or (1,))[1:]
        index_T = np.arange(length)
        places = [(i // int(np.prod(inner)), *np.unravel_index(i % int(np.prod(inner)), inner))
                  if inner else (i,) for i in index_T]  # fmt: skip
        x_TD = x_BTD[0, first : first + length]
        expected = by_loops(params, x_TD, places, axes)
        np.testing.assert_allclose(found[0, first : first + length], expected, atol=2e-4)
        first += length


@pytest.mark.slow
def test_points():
    """Tokens shuffled with their coordinates have shuffled embeddings."""
    module, x_BTD = MDTPE(H, (3, 4)), normal(1, 12, D)
    variables = module.init(jax.random.key(0), x_BTD)
    places_BTA = np.stack(np.unravel_index(np.arange(12), (3, 4)), axis=-1)[None]
    shuffle = np.random.default_rng(1).permutation(12)
    layer = Layer(0, 1, coordinates_BTA=jnp.asarray(places_BTA[:, shuffle]))
    found = module.apply(variables, x_BTD[:, shuffle], layer=layer)
    np.testing.assert_allclose(found, module.apply(variables, x_BTD)[:, shuffle], atol=1e-5)
    with pytest.raises(ValueError, match="num_heads 4 must divide the embeddings' width 6"):
        MDTPE(4).init(jax.random.key(0), x_BTD)
