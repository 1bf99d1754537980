"""Packing loses nothing, lets nothing cross a boundary, and resumes on any number of processes."""

import itertools
import json
import time

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from experiments.data import batches, make_dataset, packing, text
from seqmodels.text import tokenizers
from tests.experiments.data_helpers import assert_same, concatenated, segments, take

BYTES = tokenizers.ByteTokenizer()


def random_documents(count=23, longest=90, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.bytes(n) for n in rng.integers(1, longest, count)]


def packed(documents, *, train=False, seq_len=16, batch_size=4, rows=None, seed=0):
    return packing.packed_batches(
        documents,
        BYTES,
        seq_len=seq_len,
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        train=train,
        seed=seed,
        what="a test",
    )


@pytest.mark.parametrize("seq_len", [1, 2, 16, 17, 200])
def test_one_pass_holds_every_byte_once_as_input_and_as_label_and_every_end(seq_len):
    documents = random_documents() + [
        b"",
        b"x" * (seq_len - 1),
        b"y" * seq_len,
        b"z" * (seq_len + 1),
    ]
    documents = [d for d in documents if d] + [b""]
    inputs, labels = [], []
    for batch in packed(documents, seq_len=seq_len):
        assert batch["inputs"].shape == (4, seq_len)
        inputs.append(batch["inputs"][batch["segment_ids"] > 0])
        labels.append(batch["labels"][batch["loss_mask"] > 0])
        padding = batch["segment_ids"] == 0
        assert not any(batch[k][padding].any() for k in batch)
        np.testing.assert_array_equal(batch["loss_mask"] > 0, ~padding)
        np.testing.assert_array_equal(batch["num_bytes"], ~padding & (batch["labels"] < 256))
    order = batches.EpochOrder(len(documents), 0)
    documents = [documents[order[i]] for i in range(len(documents))]
    expected = np.concatenate([[256, *d] for d in documents if d])
    np.testing.assert_array_equal(np.concatenate(inputs), expected)
    # What follows each token is the next one; the last document's end is followed by no other's
    # start.
    np.testing.assert_array_equal(np.concatenate(labels), [*expected[1:], 256])


def test_rows_by_hand():
    """Documents that end inside a row, at its end, and a token behind it."""
    iterator = iter(packed([b"abc"], train=True, seq_len=3, batch_size=1))
    a, b, c, end = 97, 98, 99, 256
    for inputs, labels, ids in (
        ([end, a, b], [a, b, c], [1, 1, 1]),
        ([c, end, a], [end, a, b], [1, 2, 2]),  # the rest of a document, as a segment of its own
        ([b, c, end], [c, end, a], [1, 1, 2]),
        ([a, b, c], [b, c, end], [1, 1, 1]),
        ([end, a, b], [a, b, c], [1, 1, 1]),
    ):
        batch = next(iterator)
        for key, row in (("inputs", inputs), ("labels", labels), ("segment_ids", ids)):
            assert batch[key].tolist() == [row], key
    # A position as saved by runs that had no labels at documents' ends: all but the last token are
    # used up.
    iterator.set_state(iterator.get_state() | {"document": [0], "offset": [3]})
    assert next(iterator)["inputs"].tolist() == [[c, end, a]]


@pytest.mark.parametrize("seq_len", [2, 3, 4, 16])
def test_a_piece_of_a_document_has_no_end(seq_len):
    parts = [text.Piece(b"abc"), text.Piece(b"d"), b"ef", b"", text.Piece(b"")]
    inputs, labels = [], []
    for batch in packed(parts, seq_len=seq_len, batch_size=2):
        np.testing.assert_array_equal(batch["loss_mask"] > 0, batch["segment_ids"] > 0)
        inputs.append(batch["inputs"][batch["segment_ids"] > 0])
        labels.append(batch["labels"][batch["segment_ids"] > 0])
    expected = {b"abc": ([256, *b"ab"], [*b"abc"]), b"d": ([256], [*b"d"])}
    expected |= {b"ef": ([256, *b"ef"], [*b"ef", 256]), b"": ([], [])}
    order = packing.one_pass_order(len(parts))
    for found, part in ((inputs, 0), (labels, 1)):
        rows = [expected[parts[order[i]]][part] for i in range(len(parts))]
        assert np.concatenate(found).tolist() == sum(rows, [])


def test_the_start_of_one_pass_is_a_sample():
    """Not the corpus's first files, and the same whatever seed training has."""
    documents = [bytes([i]) for i in range(200)]
    (first, *_), (other, *_) = (list(packed(documents, seed=seed)) for seed in (0, 1))
    assert_same([first], [other])
    seen = first["labels"][first["num_bytes"] > 0]
    assert 60 < seen.mean() < 140 and seen.max() > 150


def test_labels_follow_their_inputs_and_end_with_the_document():
    documents = random_documents()
    ends = 0
    for batch in packed(documents):
        for inputs, labels, mask in segments(batch):
            np.testing.assert_array_equal(labels[:-1], inputs[1:])
            assert mask.all()
            ends += labels[-1] == 256
            assert 256 not in inputs[1:], "a segment holds one document"
    assert ends == len(documents)


def test_only_the_end_of_a_pass_is_padded():
    *full, last = packed(random_documents())
    assert all((batch["segment_ids"] > 0).all() for batch in full)
    flat = (last["segment_ids"] > 0).reshape(-1)
    assert flat[: flat.sum()].all()


def test_an_epoch_is_every_document_and_the_next_has_another_order():
    documents = [bytes([i]) for i in range(40)]  # two tokens each: a row of 16 holds 8
    rows = take(iter(packed(documents, train=True, batch_size=1)), 15)
    seen = np.concatenate([b["labels"][b["num_bytes"] > 0] for b in rows]).reshape(3, 40)
    for epoch in seen:
        assert sorted(epoch) == list(range(40))
    assert len({tuple(epoch) for epoch in seen}) == 3
    assert not np.array_equal(seen[0], np.arange(40))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 50, 64, 65, 1000, (1 << 14) + 1])
def test_every_epoch_of_a_shuffle_holds_everything_in_a_new_order(n):
    order = batches.EpochOrder(n, seed=3)
    first, second = ([order[i] for i in range(e * n, (e + 1) * n)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n))
    if n >= 50:
        other = batches.EpochOrder(n, seed=4)
        orders = first, second, [other[i] for i in range(n)], list(range(n))
        for one, two in itertools.combinations(orders, 2):
            # Independent orders agree in one place on average, and neighbours are no likelier.
            assert np.equal(one, two).sum() < 8
            assert np.equal(one, np.roll(two, 1)).sum() < 8


@pytest.mark.parametrize("n", [3, 5, 16])
def test_every_place_of_a_shuffle_is_equally_likely(n):
    order, epochs = batches.EpochOrder(n, seed=0), 4000
    drawn = np.asarray([order[i] for i in range(epochs * n)]).reshape(epochs, n)
    counts = np.stack([(drawn == value).sum(0) for value in range(n)])
    np.testing.assert_allclose(counts / epochs, 1 / n, atol=5 * np.sqrt(1 / n / epochs))


def test_the_rows_of_a_batch_come_from_different_documents():
    documents = [bytes([i]) * 500 for i in range(8)]
    read = take(iter(packed(documents, train=True, batch_size=8)), 80)
    for batch in read[:20]:
        assert len(set(batch["labels"][:, 0])) == 8
    # A lane is one stream, of documents and their ends: what follows each token is the next one.
    for lane in range(8):
        inputs, labels = (np.concatenate([b[k][lane] for b in read]) for k in ("inputs", "labels"))
        np.testing.assert_array_equal(inputs[1:], labels[:-1])
        assert np.flatnonzero(labels == 256).tolist() == [500, 1001]


@pytest.fixture
def config(tmp_path):
    for i, document in enumerate(random_documents(120, 300)):
        (tmp_path / f"{i}.txt").write_bytes(document)
    return {"name": "text", "paths": str(tmp_path), "seq_len": 32, "batch_size": 4}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact(config, split, prefetch):
    dataset = make_dataset(config | {"prefetch": prefetch, "batch_size": 2}, split)
    whole = take(iter(dataset), 200)
    for steps in (0, 1, 7):
        iterator = iter(dataset)
        take(iterator, steps)
        state = json.loads(json.dumps(iterator.get_state()))
        for other in (iter(dataset), iterator):  # a new object; and back in one that ran on
            take(iterator, 3)
            other.set_state(state)
            assert_same(take(other, 200 - steps), whole[steps:])


def test_the_iterator_goes_into_an_orbax_checkpoint(config, tmp_path):
    dataset = make_dataset(config, "train")
    iterator = iter(dataset)
    take(iterator, 5)
    ocp.save_checkpointables(tmp_path / "saved", {"data": iterator})
    expected = take(iterator, 4)
    restored = iter(dataset)
    ocp.load_checkpointables(tmp_path / "saved", {"data": restored})
    assert_same(take(restored, 4), expected)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_batch_of_one(config, split, processes):
    one = take(iter(make_dataset(config, split)), 30)
    parts = [
        take(iter(make_dataset(config, split, process_index=i, process_count=processes)), 30)
        for i in range(processes)
    ]
    assert all(b["inputs"].shape == (4 // processes, 32) for part in parts for b in part)
    assert_same(concatenated(*parts), one)


def test_the_seed_decides_the_order(config):
    first, again, other = (
        take(iter(make_dataset(config | {"seed": seed}, "train")), 5) for seed in (0, 0, 1)
    )
    assert_same(first, again)
    assert not np.array_equal(first[0]["inputs"], other[0]["inputs"])


def resized(documents, batch_sizes, batches_each, seq_len=16):
    """Bytes read of each document, by its place in the order, and the last position, of a stream
    that goes on in lanes of another number again and again. Documents are one byte each, repeated.
    """
    order = batches.EpochOrder(len(documents), 0)
    place_W = np.empty(256, int)
    place_W[[documents[order[i]][0] for i in range(len(documents))]] = range(len(documents))
    count_N, state = np.zeros(len(documents), int), None
    for batch_size in batch_sizes:
        stream = iter(packed(documents, train=True, seq_len=seq_len, batch_size=batch_size))
        if state is not None:
            stream.set_state(state)
        for batch in take(stream, batches_each):
            labels = batch["labels"][batch["loss_mask"] > 0]
            np.add.at(count_N, place_W[labels[labels < 256]], 1)
        state = json.loads(json.dumps(stream.get_state()))
    return count_N, state


@pytest.mark.parametrize("batch_sizes", [(4, 8, 16), (2, 3, 3), (8, 3), (4, 8, 4), (6, 1, 5, 2)])
@pytest.mark.parametrize("batches_each", [1, 3])
def test_another_batch_size_goes_on_with_documents_that_nobody_has_read(batch_sizes, batches_each):
    rng = np.random.default_rng(1)
    documents = [bytes([i]) * int(rng.integers(1, 40)) for i in range(256)]
    order = batches.EpochOrder(len(documents), 0)
    length_N = np.asarray([len(documents[order[i]]) for i in range(len(documents))])
    count_N, state = resized(documents, batch_sizes, batches_each)
    assert max(state["document"]) < len(documents), "the test is of one epoch"
    assert len(state["document"]) == len(set(state["document"])) == batch_sizes[-1]
    assert (count_N <= length_N).all(), "a document was read twice"
    left_out = (count_N < length_N)[: min(state["document"])].sum()
    lanes_left_out = sum(max(0, a - b) for a, b in itertools.pairwise(batch_sizes))
    assert left_out <= 3 * lanes_left_out


def test_processes_share_out_what_another_number_wrote_with_another_batch_size(config):
    def states_and_batches(batch_size, processes, state=None):
        streams = [
            iter(
                make_dataset(
                    config | {"batch_size": batch_size},
                    "train",
                    process_index=i,
                    process_count=processes,
                )
            )
            for i in range(processes)
        ]
        for stream in streams:
            if state is not None:
                stream.set_state(state)
        parts = [take(stream, 5) for stream in streams]
        return batches.join_states([s.get_state() for s in streams]), concatenated(*parts)

    start, _ = states_and_batches(4, 2)
    end, one = states_and_batches(8, 1, start)
    for processes in (2, 4):
        other_end, same = states_and_batches(8, processes, start)
        assert_same(same, one)
        assert other_end == end
    back, _ = states_and_batches(4, 4, end)
    assert list(back["lanes"].values())[-1] == 4
    with pytest.raises(ValueError, match="2 of 4 lanes, and this process reads 8 of 8"):
        half = iter(make_dataset(config, "train", process_index=0, process_count=2)).get_state()
        iter(make_dataset(config | {"batch_size": 8}, "train")).set_state(half)


def test_a_position_in_text_that_has_changed_is_refused(config):
    state = iter(make_dataset(config, "train")).get_state()
    with pytest.raises(ValueError, match=r"train split of text has changed .* documents, and has"):
        iter(make_dataset(config | {"documents": "lines"}, "train")).set_state(state)

    documents = random_documents(40, longest=900)
    stream = iter(packed(documents, train=True))
    take(stream, 3)
    state = stream.get_state()
    for other, message in (
        (documents[1:], "had 40 documents, and has 39. .* --new_data"),
        (random_documents(40, 900, seed=1), "as many documents, and other ones"),
    ):
        with pytest.raises(ValueError, match=message):
            iter(packed(other, train=True)).set_state(state)

    order = batches.EpochOrder(40, 0)  # every third document is hashed: this one is not
    number = next(order[i] for i in state["document"] if order[i] % 3)
    changed = [b"x" if i == number else document for i, document in enumerate(documents)]
    stream.set_state(state)
    other = iter(packed(changed, train=True))
    other.set_state(state)
    with pytest.raises(ValueError, match="of a document that has 3: the text has changed"):
        next(other)


def test_a_position_in_another_kind_of_dataset_is_refused(config):
    text, task = (iter(make_dataset(c, "train")) for c in (config, {"name": "parity"}))
    for stream, other in ((text, task), (task, text)):
        with pytest.raises(ValueError, match="it is of another kind of dataset"):
            stream.set_state(other.get_state())


@pytest.mark.parametrize("train", [True, False])
def test_a_corpus_of_nothing(train):
    with pytest.raises(ValueError, match="Empty corpus: a test has no documents"):
        packed([], train=train)
    with pytest.raises(ValueError, match="every document of a test is empty"):
        next(iter(packed([b""] * 5, train=train)))
    next(iter(packed([b""] * 5 + [b"some"], train=train)))


def test_packing_keeps_up_with_training():
    """200k tokens/s are asked for and some 50M/s seen; this catches a loop over tokens."""
    documents = random_documents(200, 20_000)
    iterator = iter(packed(documents, train=True, seq_len=512, batch_size=16))
    next(iterator)
    start = time.process_time()
    take(iterator, 100)
    assert 100 * 16 * 512 / (time.process_time() - start) > 1_000_000
