"""TPU kernels under `jax.shard_map` as it comes, with `check_vma`: lowered for chips that are not
there.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kernels_pallas
from experiments.planning import parts
from kernels_pallas.tools import tpu_compile

TOPOLOGY = "v6e:2x2"
ROWS, SAME = PartitionSpec("part"), PartitionSpec()
q, x, channels = (4, 64, 2, 128), (4, 64, 256), (256,)
CALLS = [
    ("linear_attention", [q, q, q, (2,)]),
    ("delta_rule", [q, q, q, q[:3]]),
    ("diagonal_scan", [x, channels]),
    ("causal_conv", [x, (4, 256)]),
]


def _gradient(name, shapes, **keywords):
    """Of a call whose rows are split, and what it is traced with."""
    where = parts.find(TOPOLOGY)
    mesh = jax.make_mesh((4,), ("part",), (AxisType.Auto,), devices=where.devices)
    specs = tuple(ROWS if len(shape) > 2 else SAME for shape in shapes)
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs)
    ]

    def call(*operands):
        return jax.tree.leaves(getattr(kernels_pallas, name)(*operands, **keywords))[0]

    split = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=ROWS)
    numbers = tuple(range(len(shapes)))
    loss = jax.value_and_grad(lambda *operands: jnp.sum(split(*operands)), numbers)
    return jax.jit(loss), operands


@pytest.mark.parametrize("name, shapes", CALLS)
def test_kernels_lower(name, shapes):
    """Forward and backward; a decay, or weights, are the same on every chip."""
    gradient, operands = _gradient(name, shapes, implementation="pallas_tpu")
    with tpu_compile.tracing_for(TOPOLOGY):
        text = gradient.trace(*operands).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2


def test_splash_attention_is_refused():
    """JAX's own kernel says nothing of the axes; the next implementation serves where none is
    named.
    """
    gradient, operands = _gradient("softmax_attention", [q] * 3, implementation="splash")
    with tpu_compile.tracing_for(TOPOLOGY):
        with pytest.raises(NotImplementedError, match="'splash' .* pass check_vma=False"):
            gradient.trace(*operands)
        gradient, operands = _gradient("softmax_attention", [q] * 3)
        assert "splash" not in str(gradient.trace(*operands).jaxpr)
