"""Packs documents into rows of fixed length by concatenating and splitting them, in lanes.

A document's tokens are [document id, t_1, ..., t_n, document id], so that a model learns where a
text ends. Every t_i and the end are predicted exactly once, from the tokens before them in the same
row: summed losses are those of the whole text and of its documents' ends. A document that was cut
for reading (`text.Piece`) has no end.

Rows are filled to their ends. A document that does not fit continues in its lane's next row as a
new segment: a model's state and context do not cross the cut, but the label of the last token
before it is the first token after it, so no prediction is lost. Only padding, in the last rows of
a one-pass split, has no label. (First-fit packing would keep more short documents whole, but leaves
holes, and must read ahead.)

Lanes: of B rows in a batch, row r of every batch belongs to lane r, and lane r reads documents r, r
+ B, r + 2B, ... of the shuffled stream. So a batch holds B different documents, a process reads
only its own lanes, and the global batch is the same for any number of processes. A one-pass split
has one lane, which every process reads whole and takes its rows from, so that all see the same
number of batches.

A run can resume with another batch size. Remaining lanes continue up to the first document that was
given to no lane; from there on documents are distributed over all lanes anew. So no document is
read twice in an epoch. With more lanes none is left out; with fewer, the unread rest of the dropped
lanes' documents waits for the next epoch.
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
    """Returns the dataset of batches of packed documents: of each global batch the given `rows`.

    documents: random access to bytes (`len`, `[i]`).
    train: True repeats forever in a new order each epoch. False is one pass, in a shuffled order
      that does not depend on `seed`, so that an evaluation's first batches are a sample.
    what: names the corpus in errors.
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
    """Returns a document's tokens (N, 2): each one's id, and the bytes of text it stands for.

    A Piece has no end token, and an empty document only a start token. Bytes are counted by the
    tokenizer's num_bytes_W; the last token's make them add up to len(data), also where the
    tokenizer changes the text (a normalizer, dropped spaces, characters that the vocabulary lacks).
    """
    start = [tokenizer.document_id]
    end = start * (len(data) > 0 and not isinstance(data, Piece))
    ids_N = np.concatenate([start, tokenizer.encode(data), end], dtype=np.int32, casting="unsafe")
    num_bytes_N = tokenizer.num_bytes_W[ids_N]
    num_bytes_N[-1] += len(data) - num_bytes_N[1:].sum()
    return np.stack([ids_N, num_bytes_N], axis=-1)


def one_pass_order(n: int) -> batches.EpochOrder:
    """Returns the order in which one pass over a validation or test split reads its n documents."""
    return batches.EpochOrder(n, 0)


_SAMPLED = 16  # documents of which a corpus' hash is made
_RESTART = "Bring back the text it was saved with, or go on from this one's start: experiments.train --new_data"


class PackIterDataset(grain.IterDataset):
    """Dataset that packs documents into rows (see this module's docstring) and yields batches.

    documents: Grain's MapDataset of arrays (N, 2), as `document_tokens` returns; read in `order`.
    endless: whether epoch follows epoch, in a lane per row; else it is one epoch, in one lane.
    rows: those of the global batch that this process reads.
    """

    def __init__(self, documents, order, endless, *, seq_len, batch_size, rows, what):
        super().__init__(documents)
        self.documents, self.order, self.endless, self.what = documents, order, endless, what
        self.seq_len, self.rows = seq_len, rows
        self.num_lanes = batch_size if endless else 1
        self.rows_per_lane = batch_size // self.num_lanes
        self.lanes = range(
            rows.start // self.rows_per_lane, (rows.stop - 1) // self.rows_per_lane + 1
        )

    @functools.cached_property
    def corpus(self) -> dict[str, int | str]:
        """Number of documents and a hash of some, for which alone a saved position is valid."""
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
    """Reader of one lane: the documents of one row of every batch; of all rows in a one-pass split.

    deals: rising pairs (first, lanes): from document `first` on, documents are dealt in turn to
      this many lanes, among which this one has the number `index`.
    document, offset: number of the current document in the stream, and of its tokens used.
    """

    def __init__(self, dataset: PackIterDataset, deals, index: int, document: int, offset: int):
        self.dataset, self.deals, self.index = dataset, deals, index
        self.document, self.offset = document, offset
        self.tokens = None  # of the current document, read when first needed

    def following(self) -> int:
        """Returns the number, in the shuffled stream, of the document that the lane reads next."""
        later = [deal for deal in self.deals if deal[0] > self.document]
        number = self.document + self.deals[-len(later) - 1][1]
        for first, _ in later:
            if number >= first:
                number = first + self.index
        return number

    def current(self) -> np.ndarray | None:
        """Returns the current document's tokens, skipping empty ones; None at the stream's end."""
        d, skipped = self.dataset, 0
        # A lane meets documents at random: only after a long run of empty ones are all taken to be.
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
        """Writes the lane's next row into the arrays; returns False if the stream has ended."""
        filled, segment = 0, 0
        while filled < len(inputs_T) and (tokens_N2 := self.current()) is not None:
            # One token beyond the row: it is the last label and no input.
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
        batch = batches.empty(len(self._lanes) * d.rows_per_lane, d.seq_len)
        filled = [
            lane.fill(*(batch[key][i * d.rows_per_lane + r] for key in batch))
            for i, lane in enumerate(self._lanes)
            for r in range(d.rows_per_lane)
        ]
        if not any(filled):
            raise StopIteration
        first = d.rows.start - d.lanes.start * d.rows_per_lane
        return {key: value[first : first + len(d.rows)] for key, value in batch.items()}

    def get_state(self) -> batches.State:
        return {
            "document": [lane.document for lane in self._lanes],
            "offset": [lane.offset for lane in self._lanes],
            "lanes": {str(first): lanes for first, lanes in self._deals},
            "corpus": self._dataset.corpus,
        }

    def set_state(self, state: batches.State) -> None:
        """Restores a data position: this process's, or that of all processes, joined.

        The joined one may have another number of lanes (batch size) than this dataset.
        Raises ValueError for another corpus, or for some but not all lanes.
        """
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
    """Returns (deals, positions) that continue a saved position with another number of lanes."""
    # The first document that no lane was given, or that a dropped lane has not begun.
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
