"""Documents into rows of fixed length: concatenate and split, in lanes.

A document's tokens are [document id, t_1, ..., t_n, document id]: the id that the next document
starts with is what its last token is followed by, so that a model learns where a text ends. Every t_i
and the end are predicted exactly once, from the tokens before them in the same row, so summed losses
are those of the whole text, byte for byte, and of where its documents end.

A document that is cut for reading (`text.Piece`) has no such end: what follows is not told.

A row is filled to its end. A document that does not fit goes on at the start of its lane's next
row, as a new segment: a model's state and context do not reach over the cut, yet the target of the
last token before it is the first token after it, so no prediction is lost. Every token has a target
but padding, which only the last rows of a one-pass split carry. (First-fit packing would keep more
short documents whole, but leaves holes and must read ahead, and its rows then depend on how far.)

Lanes. Row r of every batch belongs to lane r, and lane r reads documents r, r + B, r + 2B, ... of
the shuffled stream. So a batch holds B different documents, a process reads only its own lanes, and
the global batch is the same for any number of processes. A one-pass split has a single lane, which
every process reads whole and takes its rows from: all processes then see the same number of batches.
"""

import functools

import grain
import numpy as np

from experiments.data import batches
from experiments.data.text import Piece
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
    train=True repeats for ever in a new order each epoch; False is one pass, in an order that does not
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
    """A document from its start to its end: (N, 2), of each token its id and the bytes of text it stands for. A Piece has no
    end, and an empty document its start alone.

    The bytes are those of num_bytes_W. What it cannot know (text that a normalizer changes, spaces that are dropped,
    characters that the vocabulary lacks) is counted at the last token, so that they add up to len(data), always.
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


class PackIterDataset(grain.IterDataset):
    """Packs a MapDataset of token arrays; see the module's docstring.

    order: of the documents.  endless: epoch after epoch, in lanes; else its first epoch, in one lane.
    """

    def __init__(self, documents, order, endless, *, seq_len, batch_size, rows, what):
        super().__init__(documents)
        self.documents, self.order, self.endless, self.what = documents, order, endless, what
        self.seq_len, self.rows = seq_len, rows
        self.num_lanes = batch_size if endless else 1
        self.rows_a_lane = batch_size // self.num_lanes
        self.lanes = range(rows.start // self.rows_a_lane, (rows.stop - 1) // self.rows_a_lane + 1)

    def __iter__(self):
        return _PackIterator(self)

    def __str__(self):
        return f"PackIterDataset(seq_len={self.seq_len}, lanes={self.lanes})"


class _Lane:
    """A place in the stream: a document's number and how many of its tokens are used up."""

    def __init__(self, dataset: PackIterDataset, document: int, offset: int):
        self.dataset, self.document, self.offset = dataset, document, offset
        self.tokens = None  # of the current document, read when first needed

    def current(self) -> np.ndarray | None:
        """The current document's tokens, empty documents passed over; None at the stream's end."""
        d, skipped = self.dataset, 0
        # A lane meets documents at random, so only a long run of empty ones says that all of them are.
        patience = len(d.documents) + (1000 if d.endless else 0)
        while self.tokens is None:
            if not d.endless and self.document >= len(d.documents):
                return None
            tokens = d.documents[d.order[self.document]]
            if len(tokens) > 1:
                self.tokens = tokens
                break
            self.document += d.num_lanes
            skipped += 1
            if skipped >= patience:
                raise ValueError(f"Empty corpus: every document of {d.what} is empty.")
        return self.tokens

    def fill(self, inputs_T, targets_T, segment_ids_T, loss_mask_T, num_bytes_T) -> bool:
        """Writes the lane's next row; False where the stream had ended before it."""
        filled, segment = 0, 0
        while filled < len(inputs_T) and (tokens_N2 := self.current()) is not None:
            # The token after the row's last is a target, not an input.
            piece_N2 = tokens_N2[self.offset : self.offset + len(inputs_T) - filled + 1]
            used = slice(filled, filled + len(piece_N2) - 1)
            segment += len(piece_N2) > 1
            inputs_T[used] = piece_N2[:-1, 0]
            targets_T[used], num_bytes_T[used] = piece_N2[1:].T
            segment_ids_T[used] = segment
            loss_mask_T[used] = 1.0
            filled = used.stop
            self.offset += len(piece_N2) - 1
            if self.offset == len(tokens_N2) - 1:  # the last token is never an input
                self.document += self.dataset.num_lanes
                self.offset, self.tokens = 0, None
        return segment > 0


class _PackIterator(grain.DatasetIterator):
    def __init__(self, dataset: PackIterDataset):
        super().__init__()
        self._dataset = dataset
        self._place([(lane, 0) for lane in dataset.lanes])

    def _place(self, positions):
        self._lanes = [_Lane(self._dataset, *position) for position in positions]

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
                "batch_size of the run that saved it."
            )
        self._place(zip(documents, offsets))
