import errno
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.launch.distributed import DataShare
from experiments.training.checkpoints import Checkpoints, DataPosition, SaveFailed, TrainState


class Counter:
    """A data iterator, with as much as checkpoints use of one."""

    def __init__(self, count=0):
        self.count = count

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


def make_state(step, width=3):
    params = {"kernel": jnp.full((2, width), step, jnp.float32)}
    moments = {"kernel": jnp.full((2, width), -step, jnp.float32)}
    return TrainState(jnp.int32(step), params, ({"mu": moments, "count": jnp.int32(step)}, ()))


def abstract_state(width=3):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = jax.eval_shape(lambda: make_state(0, width))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), leaves)


def test_keeps_the_latest_and_restores_state_and_data_position(tmp_path):
    written = Checkpoints(tmp_path, keep=2)
    assert written.latest_step() is None
    for step in (1, 2, 3):
        written.save(make_state(step), Counter(10 * step))
    written.close()

    found = Checkpoints(tmp_path, keep=2)
    assert found.steps() == [2, 3]
    data = Counter()
    state = found.restore(3, abstract_state(), data)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))
    assert data.count == 30
    parts = found.restore_parts(2, abstract_state(), ("params",))
    assert set(parts) == {"params"} and (parts["params"]["kernel"] == 2).all()


def test_saving_goes_on_in_the_background_with_the_values_of_its_step(tmp_path, monkeypatch):
    """The training step donates the state that is being saved, and the iterator moves on."""
    may_write = threading.Event()
    save = DataPosition.save

    async def slow_save(self, directory):
        write = await save(self, directory)

        async def wait_and_write():
            assert may_write.wait(30)
            await write

        return wait_and_write()

    monkeypatch.setattr(DataPosition, "save", slow_save)
    written, data = Checkpoints(tmp_path), Counter(7)
    state = make_state(1)
    written.save(state, data)
    next_step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for _ in range(3):
        state = next_step(state)
    data.count = 99
    written.poll()
    assert Checkpoints(tmp_path, training=False).steps() == []
    may_write.set()
    written.close()

    found, data = Checkpoints(tmp_path), Counter()
    restored = found.restore(1, abstract_state(), data)
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(1))
    assert data.count == 7


def test_what_an_interrupted_save_left_is_no_checkpoint_and_is_removed(tmp_path):
    written = Checkpoints(tmp_path)
    written.save(make_state(1), Counter())
    written.close()
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (unfinished / "params").mkdir(parents=True)
    assert Checkpoints(tmp_path, training=False).steps() == [1]
    assert unfinished.exists()
    assert Checkpoints(tmp_path).steps() == [1]
    assert not unfinished.exists()


def test_a_full_disk_stops_with_the_reason_and_spares_earlier_checkpoints(tmp_path, monkeypatch):
    written = Checkpoints(tmp_path, keep=1)
    written.save(make_state(1), Counter(1))
    written.wait()

    async def no_space(self, directory):
        async def write():
            await directory.await_creation()
            raise OSError(errno.ENOSPC, "No space left on device")

        return write()

    with monkeypatch.context() as patch:
        patch.setattr(DataPosition, "save", no_space)
        written.save(make_state(2), Counter(2))
        with pytest.raises(
            SaveFailed, match=r"no space left on device. Intact checkpoints: steps 1\."
        ):
            for _ in range(1000):
                written.poll()
                threading.Event().wait(0.01)
    written.close()

    found, data = Checkpoints(tmp_path, keep=1), Counter()
    assert found.steps() == [1]
    restored = found.restore(1, abstract_state(), data)
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(1))
    found.save(make_state(2), Counter(2))
    found.close()
    assert Checkpoints(tmp_path).steps() == [2]


def test_another_model_is_refused_with_the_differing_paths(tmp_path):
    written = Checkpoints(tmp_path)
    written.save(make_state(1), Counter())
    written.close()
    other = abstract_state(width=5)
    other.params["bias"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    with pytest.raises(ValueError, match="of another model or optimizer") as error:
        Checkpoints(tmp_path).restore(1, other, Counter())
    lines = str(error.value).split("\n")[1:]
    assert lines == [
        "  params/bias: checkpoint has none, this config (5,)",
        "  params/kernel: checkpoint (2, 3), this config (2, 5)",
        "  training/opt_state/0/mu/kernel: checkpoint (2, 3), this config (2, 5)",
    ]


class Rows(Counter):
    """A data iterator with a state for each of its rows, like that of packed text."""

    def __init__(self, rows=()):
        self.rows = list(rows)

    def get_state(self):
        return {"step": 7, "row": {"place": self.rows}}

    def set_state(self, state):
        assert state["step"] == 7
        self.rows = state["row"]["place"]


def test_the_data_position_is_whole_for_any_number_of_processes(tmp_path):
    """Two processes write it, and one or three read it, of which each takes its own share."""
    shares = [DataShare(i, 2) for i in range(2)]
    written = Checkpoints(tmp_path, share=shares[0])
    written.save(make_state(1), Rows([10, 11, 12]))
    written.close()
    folder = tmp_path / "checkpoints" / "1" / "data"
    assert [path.name for path in folder.glob("*.json")] == ["share_0_of_2.json"]
    with pytest.raises(ValueError, match=r"is not whole: it lacks share_1_of_2\.json"):
        Checkpoints(tmp_path).restore(1, abstract_state(), Rows())
    (folder / "share_1_of_2.json").write_text(json.dumps(Rows([13, 14, 15]).get_state()))
    for share in (DataShare(), DataShare(2, 3)):
        data = Rows()
        Checkpoints(tmp_path, share=share).restore(1, abstract_state(), data)
        assert data.rows == [10, 11, 12, 13, 14, 15]
    (folder / "share_1_of_2.json").write_text(json.dumps({"step": 8, "row": {"place": []}}))
    with pytest.raises(ValueError, match="disagree on 'step'"):
        Checkpoints(tmp_path).restore(1, abstract_state(), Rows())


def test_processes_that_share_rows_write_their_position_once(tmp_path):
    written = Checkpoints(tmp_path, share=DataShare(0, 1, first=False))
    written.save(make_state(1), Counter(1))
    written.close()
    assert not any((tmp_path / "checkpoints" / "1" / "data").glob("share*"))
