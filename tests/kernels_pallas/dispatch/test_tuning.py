"""The table of sizes: what an entry holds for, and that every entry of it fits the part that it is
for."""

import contextlib
import json

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import linear_attention
from kernels_pallas.dispatch import tuning
from kernels_pallas.ops.delta_rule.tpu import tiling as delta_rule_tiling
from kernels_pallas.ops.linear_attention.tpu import tiling as linear_attention_tiling
from kernels_pallas.tools import tpu_compile

TABLE = {
    "op/kernel/bfloat16": {"chunk": 32, "unknown": 1},
    "op/kernel/bfloat16/64x64 head": {"chunk": 128},
    "op/kernel/bfloat16/64x64 head/TPU v6 lite": {"heads": 8},
}


@contextlib.contextmanager
def _device(kind, platform="tpu"):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def _lookup(*key, kind="TPU v6 lite"):
    with _device(kind):
        return tuple(tuning.lookup({"chunk": 64, "heads": 4}, "op", *key).values())


def test_an_entry_holds_for_what_continues_its_key(monkeypatch):
    monkeypatch.setattr(tuning, "_table", lambda: TABLE)
    assert _lookup("kernel", "bfloat16", "64x64 head") == (128, 8)
    assert _lookup("kernel", "bfloat16", "64x64 head", kind="TPU v5") == (128, 4)
    assert _lookup("kernel", "bfloat16", "64x64 none") == (32, 4)  # no neighbour is taken
    assert _lookup("kernel", "bfloat16", "128x64 head") == (32, 4)
    assert _lookup("kernel", "float32", "64x64 head") == (64, 4)
    assert _lookup("other", "bfloat16", "64x64 head") == (64, 4)


def test_a_trial_stands_in_front_and_what_is_asked_is_told(monkeypatch):
    monkeypatch.setattr(tuning, "_table", lambda: TABLE)
    key = "op/kernel/bfloat16/64x64 head/TPU v6 lite"
    with tuning.trying({key: {"heads": 2}}), tuning.asked() as found:
        assert _lookup("kernel", "bfloat16", "64x64 head") == (128, 2)
    assert found == {key: {"chunk": 128, "heads": 2}}
    assert _lookup("kernel", "bfloat16", "64x64 head") == (128, 8)


def test_saving_merges_and_removes(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    tuning.save({"op/a": {"heads": 2}, "op/kernel/bfloat16": {}}, path)
    assert json.loads(path.read_text()).keys() == {"op/a", *list(TABLE)[1:]}
    first = path.read_text()
    tuning.save({}, path)
    assert path.read_text() == first


def _arrays(K, V, decay, dtype, H=8):
    q, v = (jax.ShapeDtypeStruct((1, 1024, H, n), dtype) for n in (K, V))
    gate = {"none": None, "per_token": (1, 1024, H, 1), "per_channel": (1, 1024, H, K)}[decay]
    return q, q, v, gate and jax.ShapeDtypeStruct(gate, jnp.float32)


def test_every_entry_for_tpus_fits():
    """What the table says is what the tiling takes: a size that did not fit would be replaced in
    silence."""
    planners = {"linear_attention": linear_attention_tiling, "delta_rule": delta_rule_tiling}
    kinds = {part.device_kind for part in tpu_compile.PARTS.values()}
    keys = {key: sizes for key, sizes in tuning._table().items() if "/pallas_tpu/" in key}
    assert keys
    for key, sizes in keys.items():
        op, _, dtype, shape, kind = key.split("/")
        assert kind in kinds
        if op == "diagonal_scan":
            assert set(sizes) <= {"chunk_size", "width"}
            continue
        widths, decay = shape.split()
        arrays = _arrays(*map(int, widths.split("x")), decay, jnp.dtype(dtype))
        with _device(kind):
            tiling = planners[op].tiling_of(*arrays, None, None, 1.0)
        assert tiling.vmem_bytes <= planners[op].VMEM_BYTES
        taken = {"chunk_size": tiling.C, "heads": tiling.heads}
        assert taken | sizes == taken, key


@pytest.mark.parametrize("planner", [linear_attention_tiling, delta_rule_tiling])
def test_plans_ask_the_table_and_a_given_chunk_size_wins(planner):
    arrays = _arrays(128, 128, "per_token", jnp.bfloat16)
    with _device("TPU v99"), tuning.asked() as found:
        planner.tiling_of(*arrays, None, None, 1.0)
    (key,) = found
    assert key.endswith("/pallas_tpu/bfloat16/128x128 per_token/TPU v99")
    with _device("TPU v99"), tuning.trying({key: {"chunk_size": 32, "heads": 2}}):
        tiling = planner.tiling_of(*arrays, None, None, 1.0)
        assert (tiling.C, tiling.heads) == (32, 2)
        assert planner.tiling_of(*arrays, None, 64, 1.0).C == 64
        too_much = {key: {"chunk_size": 1024, "heads": 8}}
        with tuning.trying(too_much):
            tiling = planner.tiling_of(*arrays, None, None, 1.0)
        assert tiling.heads < 8 or tiling.C < 1024


def test_the_chunked_form_asks_too():
    x = jax.ShapeDtypeStruct((1, 200, 1, 8), jnp.float32)

    def program(**sizes):
        def call(x):
            return linear_attention(x, x, x, implementation="chunked", **sizes)

        return str(jax.make_jaxpr(call)(x))

    with tuning.asked() as found:
        own = program()
    (key,) = found
    assert key == "linear_attention/chunked/float32/8x8 none/cpu"
    with tuning.trying({key: {"chunk_size": 16}}):
        assert program() == program(chunk_size=16) != own
