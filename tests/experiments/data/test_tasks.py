"""Synthetic tasks: every label against a computation of another kind, and the format of each."""

import itertools
import json

import numpy as np
import pytest

from experiments.data import default_config, make_dataset, tasks
from tests.experiments.data_helpers import assert_same, concatenated, take


def examples(name, count=200, split="train", **options):
    task = tasks.make_task(name, split, **options)
    return task, [task.example(np.random.default_rng(i)) for i in range(count)]


@pytest.mark.parametrize("supervise", ["last", "all"])
def test_parity(supervise):
    task, drawn = examples("parity", 400, supervise=supervise)
    for bits, labels, mask in drawn:
        assert set(bits) <= {0, 1}
        for t in range(len(bits)):
            assert labels[t] == sum(bits[: t + 1]) % 2
        counts = [supervise == "all" and t >= 2 or t == len(bits) - 1 for t in range(len(bits))]
        assert mask.tolist() == counts, "prefixes of 3 bits and more"
    found = [len(bits) for bits, _, _ in drawn]
    assert min(found) == 3 and max(found) == 40 == task.row_length
    assert 0.4 < np.mean([labels[-1] for _, labels, _ in drawn]) < 0.6


def expression(task, inputs):
    return "".join(
        str(i) if i < task.modulus else "+-*()="[i - task.modulus] for i in inputs.tolist()
    )


@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("brackets", [True, False])
def test_modular_arithmetic(brackets, multiply):
    task, drawn = examples("modular_arithmetic", 400, brackets=brackets, multiply=multiply)
    characters = set()
    for inputs, labels, mask in drawn:
        written = expression(task, inputs)
        assert written[-1] == "=" and written.count("=") == 1
        assert labels[-1] == eval(written[:-1]) % 5
        assert mask.tolist() == [0] * (len(inputs) - 1) + [1]
        characters |= set(written)
    operators = "+-*" if multiply else "+-"
    assert characters == set("01234=" + operators + "()" * brackets)
    found = [len(inputs) for inputs, _, _ in drawn]
    assert min(found) == (3 if brackets else 2) and max(found) == 40
    assert task.vocab_size == 11 and task.chance == 0.2


def test_modular_arithmetic_supervised_at_every_number():
    task, drawn = examples("modular_arithmetic", supervise="all", modulus=7)
    for inputs, labels, mask in drawn:
        written = expression(task, inputs)
        for t, character in enumerate(written):
            assert mask[t] == (character.isdigit() or character == "=")
            if mask[t]:
                assert labels[t] == eval(written[: t + 1].rstrip("=")) % 7


@pytest.mark.parametrize("seq_len,num_pairs", [(64, 4), (128, 8), (512, 64), (32, 8)])
def test_mqar(seq_len, num_pairs):
    _, drawn = examples("mqar", 300, seq_len=seq_len, num_pairs=num_pairs)
    gaps, fillers = [], []
    for inputs, labels, mask in drawn:
        assert len(inputs) == seq_len
        pairs = dict(zip(inputs[0 : 2 * num_pairs : 2], inputs[1 : 2 * num_pairs : 2]))
        assert len(pairs) == num_pairs == len(set(pairs.values()))
        assert all(1 <= k < 4096 <= v < 8192 for k, v in pairs.items())
        (queries,) = np.nonzero(mask)
        assert len(queries) == num_pairs and set(inputs[queries]) == set(pairs)
        assert all(labels[q] == pairs[inputs[q]] for q in queries)
        gap = (queries - 2 * num_pairs) / 2
        assert (gap >= 0).all() and (gap == gap.astype(int)).all()
        gaps += gap.astype(int).tolist()
        rest = np.ones(seq_len, bool)
        rest[: 2 * num_pairs] = rest[queries] = False
        fillers += inputs[rest].tolist()
        assert not labels[mask == 0].any()
    if seq_len > 4 * num_pairs:  # else every place is taken
        assert np.mean(gaps) < (seq_len - 2 * num_pairs) / 4 - 1, "near queries are likelier"
    if fillers:
        assert len(set(fillers)) > 1000 and max(fillers) > 8000


def test_mqar_of_mixed_sizes_trains_on_halves_and_tests_on_the_whole():
    options = {"seq_len": 64, "num_pairs": 8, "min_pairs": 2}
    task, drawn = examples("mqar", 300, **options)
    sizes = [(len(inputs), int(mask.sum())) for inputs, _, mask in drawn]
    assert set(sizes) == {(64, 8), (32, 4), (16, 2)} and task.row_length == 64
    assert min(sizes.count(size) for size in set(sizes)) > 70
    for inputs, labels, mask in drawn:
        pairs = dict(zip(inputs[0 : 2 * int(mask.sum()) : 2], inputs[1 : 2 * int(mask.sum()) : 2]))
        assert all(labels[q] == pairs[inputs[q]] for q in np.flatnonzero(mask))
    _, held_out = examples("mqar", 50, split="test", **options)
    assert {(len(inputs), int(mask.sum())) for inputs, _, mask in held_out} == {(64, 8)}


def test_mqar_gaps_follow_the_power_law():
    """The first of one pair's gap is drawn with weight (gap + 1)^-0.99."""
    task = tasks.make_task("mqar", "train", seq_len=18, num_pairs=1)
    rng = np.random.default_rng(0)
    at = [(int(np.flatnonzero(task.example(rng)[2])[0]) - 2) // 2 for _ in range(20_000)]
    expected = np.arange(1, 9) ** -0.99
    np.testing.assert_allclose(
        np.bincount(at, minlength=8) / 20_000, expected / expected.sum(), atol=0.01
    )


def test_mqar_without_random_tokens():
    _, drawn = examples("mqar", 50, random_non_queries=False)
    for inputs, _, mask in drawn:
        assert not inputs[8:][mask[8:] == 0].any()


@pytest.mark.parametrize("group,order", [("S3", 6), ("S4", 24), ("A5", 60), ("S5", 120)])
def test_word_problem(group, order):
    """Against matrices: permutation matrices multiply as the elements do."""
    task, drawn = examples("word_problem", 20, group=group, seq_len=40)
    assert task.vocab_size == order == round(1 / task.chance)
    n = int(group[1:])
    every = [p for p in itertools.permutations(range(n))]
    matrices = [np.eye(n)[:, list(p)] for p in every]
    if group[0] == "A":
        matrices = [m for m in matrices if np.linalg.det(m) > 0]
    seen = set()
    for inputs, labels, mask in drawn:
        product = np.eye(n)
        for t, g in enumerate(inputs):
            product = matrices[g] @ product
            np.testing.assert_array_equal(product, matrices[labels[t]])
        assert mask.all() and len(inputs) == 40
        seen |= set(inputs.tolist())
    assert len(seen) > 0.9 * order


def test_word_problem_of_swaps_and_of_several_tokens_an_element():
    task, drawn = examples("word_problem", 100, group="S5", swaps_only=True, seq_len=30)
    moved = (tasks.word_problem.group_elements("S5") != np.arange(5)).sum(1)
    assert {moved[g] for inputs, _, _ in drawn for g in inputs} == {0, 2}
    plain, (example, *_) = examples("word_problem", 1, group="S3", seq_len=10)
    slow, (spread, *_) = examples("word_problem", 1, group="S3", seq_len=40, tokens_per_element=4)
    assert slow.vocab_size == plain.vocab_size + 1
    np.testing.assert_array_equal(spread[0][::4], example[0])
    assert (spread[0].reshape(10, 4)[:, 1:] == 6).all()
    np.testing.assert_array_equal(spread[1][3::4], example[1])
    assert spread[2].reshape(10, 4).tolist() == [[0, 0, 0, 1]] * 10


def test_selective_copying():
    _, drawn = examples("selective_copying", seq_len=64, num_tokens=8)
    places = set()
    for inputs, labels, mask in drawn:
        context = inputs[:-8]
        assert (inputs[-8:] == 15).all() and mask.tolist() == [0] * 56 + [1] * 8
        np.testing.assert_array_equal(context[context != 14], labels[-8:])
        assert set(labels[-8:]) <= set(range(14))
        places |= set(np.flatnonzero(context != 14).tolist())
    assert len(places) == 56


@pytest.mark.parametrize("name", list(tasks.TASKS))
class TestEveryTask:
    def test_batches(self, name):
        train = make_dataset({"name": name, "batch_size": 8}, "train")
        assert train.tokenizer is None and 0 < train.chance <= 0.5
        for batch in take(iter(train), 20):
            shape = batch["inputs"].shape
            assert shape[0] == 8 and all(array.shape == shape for array in batch.values())
            assert [batch[k].dtype.name for k in ("inputs", "labels", "segment_ids", "loss_mask")] == [
                "int32", "int32", "int32", "float32",
            ]  # fmt: skip
            padding = batch["segment_ids"] == 0
            assert not any(array[padding].any() for array in batch.values())
            assert not batch["labels"][batch["loss_mask"] == 0].any()
            assert batch["loss_mask"].sum(1).min() >= 1
            for key in ("inputs", "labels"):
                assert batch[key].min() >= 0 and batch[key].max() < train.vocab_size

    def test_one_pass_has_every_example_and_full_shapes(self, name):
        config = {"name": name, "batch_size": 8, "eval_batch_size": 6, "eval_examples": 20}
        batches = list(make_dataset(config, "test"))
        assert [len(b["inputs"]) for b in batches] == [6, 6, 6, 6]
        rows = [b["segment_ids"].any(1).sum() for b in batches]
        assert rows == [6, 6, 6, 2]
        inputs = np.concatenate([b["inputs"] for b in batches])[:20]
        assert len(np.unique(inputs, axis=0)) == 20
        assert_same(list(make_dataset(config, "test")), batches)

    @pytest.mark.parametrize("num_examples", [0, 13])
    def test_resume_is_exact(self, name, num_examples):
        dataset = make_dataset(
            {"name": name, "batch_size": 4, "num_examples": num_examples}, "train"
        )
        whole, iterator = take(iter(dataset), 12), iter(dataset)
        take(iterator, 5)
        restored = iter(dataset)
        restored.set_state(json.loads(json.dumps(iterator.get_state())))
        assert_same(take(restored, 7), whole[5:])

    def test_another_batch_size_goes_on_with_the_next_example(self, name):
        config = {"name": name, "num_examples": 13}
        whole = iter(make_dataset(config | {"batch_size": 2}, "train"))
        other = iter(make_dataset(config | {"batch_size": 6}, "train"))
        take(whole, 5)
        other.set_state(json.loads(json.dumps(whole.get_state())))
        for batch in take(other, 2):
            three = take(whole, 3)
            assert_same([batch], [{k: np.concatenate([b[k] for b in three]) for k in batch}])

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_processes_share_out_the_batch_of_one(self, name, split):
        config = {"name": name, "batch_size": 6, "eval_examples": 20}
        one = take(iter(make_dataset(config, split)), 5)
        parts = [
            take(iter(make_dataset(config, split, process_index=i, process_count=3)), 5)
            for i in range(3)
        ]
        assert_same(concatenated(*parts), one)

    def test_splits_and_seeds_differ(self, name):
        task = {"name": name, "batch_size": 4} | {
            key: 0 for key in default_config(name) if key in ("eval_min_length", "eval_seq_len")
        }
        task |= {"eval_max_length": 0} if "eval_min_length" in task else {}
        first = [
            next(iter(make_dataset(task | {"seed": seed}, split)))["inputs"]
            for seed in (0, 1)
            for split in ("train", "validation", "test")
        ]
        for a, b in itertools.combinations(first, 2):
            assert a.shape == b.shape and not np.array_equal(a, b)


def test_a_finite_training_set_comes_back_in_another_order():
    config = {"name": "mqar", "batch_size": 1, "num_examples": 10}
    rows = [b["inputs"].tobytes() for b in take(iter(make_dataset(config, "train")), 30)]
    assert set(rows[:10]) == set(rows[10:20]) == set(rows[20:])
    assert len(set(rows)) == 10 and rows[:10] != rows[10:20]


def test_held_out_splits_take_their_own_lengths():
    config = {"name": "parity", "eval_min_length": 50, "eval_max_length": 60, "batch_size": 32}
    train = (next(iter(make_dataset(config, "train")))["segment_ids"] > 0).sum(1)
    held_out = next(iter(make_dataset(config, "validation")))["segment_ids"]
    assert train.max() <= 40 and held_out.shape == (32, 60)
    assert (held_out > 0).sum(1).min() >= 50


@pytest.mark.parametrize("task,first", [("parity", 49), ("modular_arithmetic", 48)])
def test_held_out_prefixes_count_from_the_shortest_length(task, first):
    config = {"name": task, "eval_min_length": 50, "eval_max_length": 60, "supervise": "all"}
    batch = next(iter(make_dataset(config | {"batch_size": 8}, "test")))
    assert np.nonzero(batch["loss_mask"].any(axis=0))[0].min() == first


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"name": "parity", "min_length": 9, "max_length": 4},
            "parity: lengths .* min_length=9 and max_length=4",
        ),
        ({"name": "parity", "supervise": "some"}, "'all' and 'last'"),
        ({"name": "modular_arithmetic", "modulus": 1}, "modulus must be at least 2"),
        ({"name": "modular_arithmetic", "brackets": True, "supervise": "all"}, "no meaning inside"),
        ({"name": "mqar", "num_pairs": 20}, "seq_len=64, num_pairs=20"),
        ({"name": "mqar", "vocab_size": 8}, "hold num_pairs=4 keys"),
        ({"name": "word_problem", "group": "M11"}, "the choices are S2, S3"),
        ({"name": "word_problem", "tokens_per_element": 3}, "multiple of tokens_per_element=3"),
        ({"name": "word_problem", "group": "A5", "swaps_only": True}, "A5 holds no swap"),
        ({"name": "selective_copying", "num_tokens": 200}, "do not fit into seq_len=256"),
        ({"name": "selective_copying", "vocab_size": 3}, "at least 4"),
        ({"name": "parity", "num_examples": -1}, "positive number of examples"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(options, "train")
