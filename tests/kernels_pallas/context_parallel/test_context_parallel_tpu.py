"""What is sent on slices of many chips, read in programs compiled for them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.planning import collectives, parts
from kernels_pallas.context_parallel import delta_rule, linear_attention
from kernels_pallas.tools import hlo, tpu_compile

B, L, H, K, V = 1, 256, 2, 128, 256
STATE, MAP = 4 * B * H * K * V, 4 * B * H * K * K
TIME = PartitionSpec(None, "seq")


def sent(operator, collective, topology):
    """(kind, bytes that a chip receives) of each kind of collective, forward and backward."""
    where = parts.find(topology)
    W = len(where.devices)
    automatic = (AxisType.Auto,)
    mesh = jax.make_mesh((W,), ("seq",), devices=where.devices, axis_types=automatic)
    sharding = NamedSharding(mesh, TIME)

    def on_a_chip(*inputs):
        return operator(*inputs, axis_name="seq", collective=collective)[0]

    over_chips = jax.shard_map(on_a_chip, mesh=mesh, in_specs=TIME, out_specs=TIME, check_vma=False)

    def run(inputs, d_o_BTHV):
        o_BTHV, vjp = jax.vjp(over_chips, *inputs)
        return o_BTHV, vjp(d_o_BTHV)

    def array(*size, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((B, W * L, *size), dtype, sharding=sharding)

    inputs = [array(H, K), array(H, K), array(H, V)]
    inputs += [array(H, dtype=jnp.float32)] if operator is delta_rule else []
    with tpu_compile.tracing_for(topology):
        lowered = jax.jit(run).trace(inputs, array(H, V)).lower(lowering_platforms=("tpu",))
    module = hlo.HloModule(lowered.compile().as_text())
    found = [collectives.read(visit, module, mesh, where) for visit in module.visits()]
    rows = collectives.grouped([c for c in found if c is not None])
    return W, [(row["kind"], row["bytes received"]) for row in rows]


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", [linear_attention, delta_rule])
def test_all_scan_on_256_chips(operator):
    """One state forward and one backward, however many chips there are."""
    _, rows = sent(operator, "all_scan", "v5p:4x8x8")
    assert rows == [("collective-permute", 2 * STATE)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator, more", [(linear_attention, 0), (delta_rule, MAP)])
@pytest.mark.parametrize("topology", ["v5p:2x4x4", "v5p:4x8x8"])
def test_all_gather(operator, more, topology):
    """One collective a way, of the others' states (and of the delta rule's maps). From 64 chips on,
    where the torus closes, libtpu itself writes a gather as an all-reduce of zeros but in one
    place, and twice as much is received."""
    W, rows = sent(operator, "all_gather", topology)
    ((kind, received),) = rows
    least = 2 * (W - 1) * (STATE + more)
    assert kind == ("all-gather" if W < 64 else "all-reduce")
    times = 1 if W < 64 else 2
    assert times * least <= received < times * least * 1.001
