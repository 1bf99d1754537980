"""Documents into rows of fixed length: concatenate and split, in lanes.

A document's tokens are [document id, t_1, ..., t_n]; every t_i is predicted exactly once, from the
tokens before it in the same row, so summed losses are those of the whole text, byte for byte.

A row is filled to its end. A document that does not fit goes on at the start of its lane's next
row, as a new segment: a model's state and context do not reach over the cut, yet the target of the
last token before it is the first token after it, so no prediction is lost. Where a document ends,
its last token has no target (loss_mask 0) and the next document starts. Only the last rows of a
one-pass split carry padding. (First-fit packing would keep more short documents whole, but leaves
holes and must read ahead, and its rows then depend on how far.)

Lanes. Row r of every batch belongs to lane r, and lane r reads documents r, r + B, r + 2B, ... of
the shuffled stream. So a batch holds B different documents, a process reads only its own lanes, and
the global batch is the same for any number of processes. A one-pass split has a single lane, which
every process reads whole and takes its rows from: all processes then see the same number of batches.
"""

import grain
import numpy as np

from experiments.data import batches
from experiments.data.tokenizers import Tokenizer


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
    train=True repeats for ever in a new order each epoch; False is one pass in the given order.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}.")
    if len(documents) == 0:
        raise ValueError(f"Empty corpus: {what} has no documents.")
    stream = grain.MapDataset.source(documents)
    if train:
        stream = stream.seed(seed).shuffle().repeat()
    stream = stream.map(tokenizer.encode_document)
    lanes = batch_size if train else 1
    return PackIterDataset(
        stream, seq_len=seq_len, batch_size=batch_size, lanes=lanes, rows=rows,
        patience=len(documents), what=what,
    )  # fmt: skip


class PackIterDataset(grain.IterDataset):
    """Packs the token arrays of a MapDataset; see the module's docstring."""

    def __init__(self, documents, *, seq_len, batch_size, lanes, rows, patience, what):
        super().__init__(documents)
        self.documents = documents
        self.seq_len = seq_len
        self.rows_a_lane = batch_size // lanes
        self.num_lanes = lanes
        self.rows = rows
        self.lanes = range(rows.start // self.rows_a_lane, (rows.stop - 1) // self.rows_a_lane + 1)
        self.patience = patience  # this many documents in a row without a target: nothing to learn
        self.what = what

    def __iter__(self):
        return _PackIterator(self)

    def __str__(self):
        return f"PackIterDataset(seq_len={self.seq_len}, lanes={self.lanes})"


class _Lane:
    """A position in the stream: a document's number and how many of its tokens are used up."""

    def __init__(self, documents, document, offset, step, patience, what):
        self.documents, self.document, self.offset = documents, document, offset
        self.step, self.patience, self.what = step, patience, what
        self.tokens = None  # of the current document, read when first needed

    def current(self) -> np.ndarray | None:
        """The current document's tokens, empty documents passed over; None at the stream's end."""
        skipped = 0
        while self.tokens is None:
            if self.document >= len(self.documents):
                return None
            tokens = self.documents[self.document]
            if len(tokens) > 1:
                self.tokens = tokens
            else:
                self.document += self.step
                skipped += 1
                if skipped > self.patience:
                    raise ValueError(f"Empty corpus: every document of {self.what} is empty.")
        return self.tokens

    def fill(self, inputs_T, targets_T, segment_ids_T, loss_mask_T) -> bool:
        """Writes the lane's next row; False where the stream had ended before it."""
        filled, segment = 0, 0
        while filled < len(inputs_T) and (tokens := self.current()) is not None:
            piece = tokens[self.offset : self.offset + len(inputs_T) - filled + 1]
            targets = len(piece) - 1  # the token after the row's last is a target, not an input
            ends = self.offset + len(piece) == len(tokens) and targets < len(inputs_T) - filled
            used = slice(filled, filled + targets + ends)
            segment += 1
            inputs_T[used] = piece[: targets + ends]
            segment_ids_T[used] = segment
            targets_T[filled : filled + targets] = piece[1:]
            loss_mask_T[filled : filled + targets] = 1.0
            filled = used.stop
            self.offset += targets + ends
            if ends:
                self.document, self.offset, self.tokens = self.document + self.step, 0, None
        return segment > 0


class _PackIterator(grain.DatasetIterator):
    def __init__(self, dataset: PackIterDataset):
        super().__init__()
        self._dataset = dataset
        self._place([(lane, 0) for lane in dataset.lanes])

    def _place(self, positions):
        d = self._dataset
        self._lanes = [
            _Lane(d.documents, document, offset, d.num_lanes, d.patience, d.what)
            for document, offset in positions
        ]

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
        }

    def set_state(self, state: batches.State) -> None:
        documents, offsets = state["document"], state["offset"]
        if len(documents) != len(self._lanes):
            raise ValueError(
                f"The saved data position has {len(documents)} lanes, this dataset has "
                f"{len(self._lanes)} (rows of the batch on this process): resume with the "
                "batch_size and the number of processes of the run that saved it."
            )
        self._place(zip(documents, offsets))
