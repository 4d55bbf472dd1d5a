"""Rows to slots. Text: a window of rows becomes one stream, the stream sequences. Other modalities:
a row is a sequence, its content stands beside the symbols.

Shape letters: B sequences in a micro-batch, T positions, R rows of a window, Q its sequences,
P places of a sequence, X bytes of a place.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from arbitor.vocab import END_OF_DOCUMENT, PADDING
from data_pipeline.decode.content import ContentError
from data_pipeline.format.shard import MediaRow
from data_pipeline.layout import Layout
from data_pipeline.permutation import keyed_permutation
from data_pipeline.row_id import media_row_ids

REASON_LENGTH = 200


class Fault(NamedTuple):
    """A row that could not be decoded; `row` is its number in the shard."""

    shard: str
    row: int
    reason: str


class WindowReport(NamedTuple):
    """How the reading of a window went."""

    rows: int = 0
    faults: tuple[Fault, ...] = ()
    truncated: int = 0  # rows whose caption did not fit


@dataclass(frozen=True)
class PackedWindow:
    """A window, read, shuffled and packed.

    Row r holds the targets row_starts[r] .. row_starts[r + 1] - 1 of the stream, and sequence q of
    the stream holds T of them from q * T; `sequences` lists the sequences in `sequence_order`,
    then padding up to whole micro-batches. Where a row is a sequence, rows are T long.
    """

    sequences: np.ndarray  # uint16 [micro_batches * B, T + 1]
    sequence_order: np.ndarray  # int64 [Q]
    row_ids: np.ndarray  # int64 [R], in packed order, without empty rows
    row_starts: np.ndarray  # int64 [R + 1]
    content: np.ndarray | None = None  # uint8 [micro_batches * B, P, X]; None for text and code
    report: WindowReport = WindowReport()

    @property
    def is_empty(self) -> bool:
        """No row of the window could be decoded."""
        return not len(self.row_ids)


@dataclass(frozen=True)
class PackedSlot:
    """What a slot trains on: symbols[:, :-1] are inputs, symbols[:, 1:] targets.

    A target that is PADDING carries no loss. The k-th position of a sequence whose symbol is PATCH
    or AUDIO_FRAME holds content[sequence, k]; what follows in `content` is 0. The arrays are views
    of the window, to be read only; it stays in memory as long as they do.
    """

    step: int
    slot: int
    source: str
    modality: str
    symbols: np.ndarray  # uint16 [B, T + 1]
    row_ids: np.ndarray  # int64: the rows with a target in the slot
    content: np.ndarray | None = None  # uint8 [B, P, X]; None for text and code
    opened: WindowReport | None = None  # where the slot is the first of a newly read window

    def copy(self) -> "PackedSlot":
        """The slot with arrays of its own, so that it does not hold its window."""
        content = None if self.content is None else self.content.copy()
        return replace(self, symbols=self.symbols.copy(), content=content)

    @property
    def sha256(self) -> str:
        """Hex digest of what the slot trains on."""
        digest = hashlib.sha256(self.symbols.tobytes())
        if self.content is not None:
            digest.update(self.content)
        return digest.hexdigest()


def num_micro_batches(symbols: int, batch_size: int, sequence_length: int) -> int:
    """Micro-batches of a window with `symbols` targets, as `pack_window` makes them."""
    return -(-symbols // (batch_size * sequence_length))


def pack_window(
    rows: Sequence[bytes],
    ids: np.ndarray,
    batch_size: int,
    sequence_length: int,
    shuffle_key: tuple[str | int, ...] | None,
) -> PackedWindow:
    """Every byte of every row, and an END_OF_DOCUMENT after it, becomes a target exactly once.

    Rows are permuted, then, once packed, the sequences; both as `shuffle_key` says, None for not
    at all. Rows of no bytes are left out. `ids` are those of `rows` (`row_id.row_ids`).
    """
    report = WindowReport(len(rows))
    filled = np.array([i for i, row in enumerate(rows) if row], np.int64)
    row_order = filled[_order(len(filled), shuffle_key, "rows")]
    rows = [rows[i] for i in row_order]
    lengths = np.array([len(row) + 1 for row in rows], np.int64)
    row_starts = np.concatenate([[0], np.cumsum(lengths)])
    num_symbols = int(row_starts[-1])

    num_sequences = -(-num_symbols // sequence_length)
    order = _order(num_sequences, shuffle_key, "sequences")
    padded = num_micro_batches(num_symbols, batch_size, sequence_length) * batch_size
    sequences = np.full((padded, sequence_length + 1), PADDING, np.uint16)
    filling = bytes(num_sequences * sequence_length - num_symbols)
    stream = np.frombuffer(b"\0".join([b"", *rows, filling]), np.uint8)
    overlapping = np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)
    sequences[:num_sequences] = overlapping[::sequence_length][order]
    _mark_ends(sequences, order, row_starts)
    return PackedWindow(sequences, order, ids[row_order], row_starts, None, report)


def _mark_ends(sequences_QT: np.ndarray, order_Q: np.ndarray, row_starts: np.ndarray) -> None:
    """Writes what is no byte: the documents' ends, where the stream has 0, and the last padding.

    The last target of a sequence is also the first symbol of the one after it.
    """
    length, count = sequences_QT.shape[1] - 1, len(order_Q)
    place = np.empty(count, np.int64)
    place[order_Q] = np.arange(count)
    sequence, symbol = np.divmod(row_starts, length)
    inside = sequence < count
    sequences_QT[place[sequence[inside]], symbol[inside]] = END_OF_DOCUMENT
    targets = (symbol == 0) & (sequence > 0)
    sequences_QT[place[sequence[targets] - 1], length] = END_OF_DOCUMENT
    if count:
        after = row_starts[-1] - (count - 1) * length + 1
        sequences_QT[place[-1], after:] = PADDING


def pack_media_window(
    rows: Sequence[MediaRow],
    places: Sequence[tuple[str, int]],
    layout: Layout,
    batch_size: int,
    seed: int,
    shuffle_key: tuple[str | int, ...] | None,
) -> PackedWindow:
    """A sequence a row, permuted as `shuffle_key` says; `places` are the rows' shards and numbers.

    A row that cannot be decoded is replaced by the next good one of the window, around its end.
    Without a good one the window is empty.
    """
    ids = media_row_ids(rows)
    target = np.empty(len(rows), np.int64)  # of each row, its sequence
    target[_order(len(rows), shuffle_key, "rows")] = np.arange(len(rows))
    num_sequences = -(-len(rows) // batch_size) * batch_size
    sequences = np.full((num_sequences, layout.sequence_length + 1), PADDING, np.uint16)
    content = np.zeros((num_sequences, layout.places, layout.place_bytes), np.uint8)
    good, faults, cut = np.zeros(len(rows), bool), [], np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        try:
            if row.problem:
                raise ContentError(row.problem)
            decoded = layout.decode(row.content)
        except ContentError as error:
            faults.append(Fault(*places[i], str(error)[:REASON_LENGTH]))
            continue
        q = target[i]
        symbols, cut[i] = layout.symbols(len(decoded), row.text, seed, int(ids[i]))
        sequences[q, 0] = END_OF_DOCUMENT
        sequences[q, 1 : len(symbols) + 1] = symbols
        content[q, : len(decoded)] = decoded
        good[i] = True
    report = WindowReport(len(rows), tuple(faults), int(cut.sum()))
    if not good.any():
        nothing = np.empty(0, np.int64)
        return PackedWindow(sequences[:0], nothing, nothing, nothing, content[:0], report)
    chosen = _next_good(good)
    for i in np.nonzero(~good)[0]:
        sequences[target[i]] = sequences[target[chosen[i]]]
        content[target[i]] = content[target[chosen[i]]]
    packed_ids = np.empty_like(ids)
    packed_ids[target] = ids[chosen]
    row_starts = np.arange(len(rows) + 1) * layout.sequence_length
    return PackedWindow(sequences, np.arange(len(rows)), packed_ids, row_starts, content, report)


def slice_micro_batch(window: PackedWindow, index: int, batch_size: int) -> tuple:
    """(symbols uint16 [B, T + 1], row ids int64 in packed order, content uint8 [B, P, X] or None)
    of micro-batch `index`; views of the window, but for the ids.
    """
    part = slice(index * batch_size, (index + 1) * batch_size)
    symbols = window.sequences[part]
    content = None if window.content is None else window.content[part]
    sequence_length = symbols.shape[1] - 1
    begin = window.sequence_order[part] * sequence_length
    end = np.minimum(begin + sequence_length, window.row_starts[-1])
    first = np.searchsorted(window.row_starts, begin, side="right") - 1
    last = np.searchsorted(window.row_starts, end, side="left")
    return symbols, window.row_ids[np.unique(_ranges(first, last))], content


def _ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The numbers first[i] .. last[i] - 1 of every i, one after the other."""
    counts = last - first
    offsets = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(first - offsets, counts)


def _next_good(good: np.ndarray) -> np.ndarray:
    """int64 [R]: each row's own number, or that of the next good row, around the end."""
    numbers = np.nonzero(good)[0]
    return numbers[np.searchsorted(numbers, np.arange(len(good))) % len(numbers)]


def _order(count: int, shuffle_key: tuple[str | int, ...] | None, what: str) -> np.ndarray:
    if shuffle_key is None:
        return np.arange(count)
    return keyed_permutation(count, *shuffle_key, what)
