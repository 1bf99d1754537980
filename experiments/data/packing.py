"""Documents into rows of fixed length: concatenate and split, in lanes.

A document's tokens are [document id, t_1, ..., t_n, document id]: the id that the next document
starts with is what its last token is followed by, so that a model learns where a text ends. Every
t_i and the end are predicted exactly once, from the tokens before them in the same row, so summed
losses are those of the whole text, byte for byte, and of where its documents end.

A document that is cut for reading (`text.Piece`) has no such end: what follows is not told.

A row is filled to its end. A document that does not fit goes on at the start of its lane's next
row, as a new segment: a model's state and context do not reach over the cut, yet the target of the
last token before it is the first token after it, so no prediction is lost. Every token has a target
but padding, which only the last rows of a one-pass split carry. (First-fit packing would keep more
short documents whole, but leaves holes and must read ahead, and its rows then depend on how far.)

Lanes. Row r of every batch belongs to lane r, and lane r reads documents r, r + B, r + 2B, ... of
the shuffled stream. So a batch holds B different documents, a process reads only its own lanes, and
the global batch is the same for any number of processes. A one-pass split has a single lane, which
every process reads whole and takes its rows from: all processes then see the same number of
batches.

A run can go on with another batch size. Lanes that stay go on where they are, to the first document
that nobody has been given; from there on documents are dealt to all lanes anew. So no document is
read twice in an epoch, and with more lanes none is left out; of lanes that are left out, what they
had not read of the documents given to them stays unread until the next epoch.
"""

import functools
import hashlib

import grain
import numpy as np
from absl import logging

from experiments.data import batches
from experiments.data.text import Piece
from seqmodels.text.tokenizers import Tokenizer


def packed_batches(
    documents,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    rows: range,
    train: bool,
    seed: int,
    what: str,
) -> grain.IterDataset:
    """Batches of `rows` out of each global batch of packed documents.

    documents: random access to bytes (`len`, `[i]`).  what: names the corpus in errors.
    train=True repeats for ever in a new order each epoch; False is one pass, in an order that does
      not
    depend on seed: an evaluation's first batches are a sample, not the corpus's first files.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}.")
    if len(documents) == 0:
        raise ValueError(f"Empty corpus: {what} has no documents.")
    tokens = grain.MapDataset.source(documents).map(functools.partial(document_tokens, tokenizer))
    n = len(documents)
    order = batches.EpochOrder(n, seed) if train else one_pass_order(n)
    return PackIterDataset(
        tokens, order, train, seq_len=seq_len, batch_size=batch_size, rows=rows, what=what
    )


def document_tokens(tokenizer: Tokenizer, data: bytes) -> np.ndarray:
    """A document from its start to its end: (N, 2), of each token its id and the bytes of text it
    stands for. A Piece has no end, and an empty document its start alone.

    The bytes are those of num_bytes_W. What it cannot know (text that a normalizer changes, spaces
    that are dropped, characters that the vocabulary lacks) is counted at the last token, so that
    they add up to len(data), always.
    """
    start = [tokenizer.document_id]
    end = start * (len(data) > 0 and not isinstance(data, Piece))
    ids_N = np.concatenate([start, tokenizer.encode(data), end], dtype=np.int32, casting="unsafe")
    num_bytes_N = tokenizer.num_bytes_W[ids_N]
    num_bytes_N[-1] += len(data) - num_bytes_N[1:].sum()
    return np.stack([ids_N, num_bytes_N], axis=-1)


def one_pass_order(n: int) -> batches.EpochOrder:
    """In which the validation and test splits read their n documents."""
    return batches.EpochOrder(n, 0)


_SAMPLED = 16  # documents that are hashed
_RESTART = "Bring back the text it was saved with, or go on from this one's start: experiments.train --new_data"


class PackIterDataset(grain.IterDataset):
    """Packs a MapDataset of token arrays; see the module's docstring.

    order: of the documents.  endless: epoch after epoch, in lanes; else its first epoch, in one
                              lane.
    """

    def __init__(self, documents, order, endless, *, seq_len, batch_size, rows, what):
        super().__init__(documents)
        self.documents, self.order, self.endless, self.what = documents, order, endless, what
        self.seq_len, self.rows = seq_len, rows
        self.num_lanes = batch_size if endless else 1
        self.rows_a_lane = batch_size // self.num_lanes
        self.lanes = range(rows.start // self.rows_a_lane, (rows.stop - 1) // self.rows_a_lane + 1)

    @functools.cached_property
    def corpus(self) -> dict[str, int | str]:
        """By what a saved position knows the documents again: how many there are, and a hash of
        some of them."""
        n = len(self.documents)
        content = hashlib.sha256()
        for i in range(0, n, -(-n // _SAMPLED)):
            content.update(self.documents[i].tobytes())
        return {"documents": n, "content": content.hexdigest()[:16]}

    def __iter__(self):
        return _PackIterator(self)

    def __str__(self):
        return f"PackIterDataset(seq_len={self.seq_len}, lanes={self.lanes})"


class _Lane:
    """A place in the stream: a document's number and how many of its tokens are used up.

    deals: rising pairs (first, lanes): from document `first` on, documents are dealt to so many
      lanes in turn.
    index: the lane's number among them.
    """

    def __init__(self, dataset: PackIterDataset, deals, index: int, document: int, offset: int):
        self.dataset, self.deals, self.index = dataset, deals, index
        self.document, self.offset = document, offset
        self.tokens = None  # of the current document, read when first needed

    def following(self) -> int:
        """The number of the lane's next document."""
        later = [deal for deal in self.deals if deal[0] > self.document]
        number = self.document + self.deals[-len(later) - 1][1]
        for first, _ in later:
            if number >= first:
                number = first + self.index
        return number

    def current(self) -> np.ndarray | None:
        """The current document's tokens, empty documents passed over; None at the stream's end."""
        d, skipped = self.dataset, 0
        # A lane meets documents at random, so only a long run of empty ones says that all of them
        # are.
        patience = len(d.documents) + (1000 if d.endless else 0)
        while self.tokens is None:
            if not d.endless and self.document >= len(d.documents):
                return None
            tokens = d.documents[d.order[self.document]]
            if self.offset and self.offset >= len(tokens) - 1:
                raise ValueError(
                    f"the position in {d.what} is token {self.offset} of a document that has {len(tokens)}: the text has "
                    f"changed. {_RESTART}"
                )
            if len(tokens) > 1:
                self.tokens = tokens
                break
            self.document = self.following()
            skipped += 1
            if skipped >= patience:
                raise ValueError(f"Empty corpus: every document of {d.what} is empty.")
        return self.tokens

    def fill(self, inputs_T, labels_T, segment_ids_T, loss_mask_T, num_bytes_T) -> bool:
        """Writes the lane's next row; False where the stream had ended before it."""
        filled, segment = 0, 0
        while filled < len(inputs_T) and (tokens_N2 := self.current()) is not None:
            # The token after the row's last is a target, not an input.
            piece_N2 = tokens_N2[self.offset : self.offset + len(inputs_T) - filled + 1]
            used = slice(filled, filled + len(piece_N2) - 1)
            segment += len(piece_N2) > 1
            inputs_T[used] = piece_N2[:-1, 0]
            labels_T[used], num_bytes_T[used] = piece_N2[1:].T
            segment_ids_T[used] = segment
            loss_mask_T[used] = 1.0
            filled = used.stop
            self.offset += len(piece_N2) - 1
            if self.offset == len(tokens_N2) - 1:  # the last token is never an input
                self.document = self.following()
                self.offset, self.tokens = 0, None
        return segment > 0


class _PackIterator(grain.DatasetIterator):
    def __init__(self, dataset: PackIterDataset):
        super().__init__()
        self._dataset = dataset
        self._place([(0, dataset.num_lanes)], [(lane, 0) for lane in dataset.lanes])

    def _place(self, deals, positions):
        self._deals = deals
        numbered = zip(self._dataset.lanes, positions, strict=True)
        self._lanes = [_Lane(self._dataset, deals, i, *position) for i, position in numbered]

    def __next__(self):
        d = self._dataset
        batch = batches.empty(len(self._lanes) * d.rows_a_lane, d.seq_len)
        filled = [
            lane.fill(*(batch[key][i * d.rows_a_lane + r] for key in batch))
            for i, lane in enumerate(self._lanes)
            for r in range(d.rows_a_lane)
        ]
        if not any(filled):
            raise StopIteration
        first = d.rows.start - d.lanes.start * d.rows_a_lane
        return {key: value[first : first + len(d.rows)] for key, value in batch.items()}

    def get_state(self) -> batches.State:
        return {
            "document": [lane.document for lane in self._lanes],
            "offset": [lane.offset for lane in self._lanes],
            "lanes": {str(first): lanes for first, lanes in self._deals},
            "corpus": self._dataset.corpus,
        }

    def set_state(self, state: batches.State) -> None:
        """state: of this process's lanes, or of all, as all processes' states are joined; then of
        any number of lanes."""
        d = self._dataset
        batches.check_state(state, ("document", "offset", "lanes", "corpus"))
        _check_corpus(d, state["corpus"])
        deals = [(int(first), lanes) for first, lanes in state["lanes"].items()]
        positions = list(zip(state["document"], state["offset"], strict=True))
        all_lanes = deals[-1][1]
        if len(positions) == all_lanes:
            if all_lanes != d.num_lanes:
                deals, positions = _deal_anew(deals, positions, d.num_lanes)
            positions = positions[d.lanes.start : d.lanes.stop]
        if len(positions) != len(d.lanes):
            raise ValueError(
                f"The data position has {len(positions)} of {all_lanes} lanes, and this process reads {len(d.lanes)} of "
                f"{d.num_lanes}: join the positions of all processes (batches.join_states)."
            )
        self._place(deals, positions)


def _deal_anew(deals, positions, lanes: int):
    """(deals, positions) with which a stream goes on in another number of lanes; see the module's
    docstring."""
    left_out = [document + (offset > 0) for document, offset in positions[lanes:]]
    if left_out:
        logging.warning(
            "the data goes on in %d lanes of %d: what the others had begun to read, and the next documents that were theirs, "
            "stay unread until the next epoch",
            *(lanes, len(positions)),
        )
    positions = positions[:lanes]
    first = max(left_out + [document + 1 for document, _ in positions])
    positions += [(first + lane, 0) for lane in range(len(positions), lanes)]
    deals = [deal for deal in deals if deal[0] < first] + [(first, lanes)]
    while len(deals) > 1 and deals[1][0] <= min(positions)[0]:
        del deals[0]  # all lanes are past it
    return deals, positions


def _check_corpus(dataset: PackIterDataset, saved: batches.State) -> None:
    here = dataset.corpus
    if here == saved:
        return
    what = f"it had {saved['documents']} documents, and has {here['documents']}"
    if here["documents"] == saved["documents"]:
        what = "it has as many documents, and other ones, or another tokenizer"
    raise ValueError(f"{dataset.what} has changed since its position was saved: {what}. {_RESTART}")
