"""Rows to symbols: a window of rows becomes one stream, the stream sequences, sequences slots.

Shape letters: B sequences in a micro-batch, T positions, R rows of a window, Q its sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arbitor.vocab import END_OF_DOCUMENT, PADDING
from data_pipeline.permutation import keyed_permutation
from data_pipeline.row_id import row_ids


@dataclass(frozen=True)
class PackedWindow:
    """A window, read, shuffled and packed.

    Row r holds the targets row_starts[r] .. row_starts[r + 1] - 1 of the stream, and sequence q of
    the stream holds T of them from q * T; `sequences` lists the sequences in `sequence_order`,
    then padding up to whole micro-batches.
    """

    sequences: np.ndarray  # uint16 [micro_batches * B, T + 1]
    sequence_order: np.ndarray  # int64 [Q]
    row_ids: np.ndarray  # int64 [R], in packed order, without empty rows
    row_starts: np.ndarray  # int64 [R + 1]


@dataclass(frozen=True)
class PackedSlot:
    """What a slot trains on: symbols[:, :-1] are inputs, symbols[:, 1:] targets.

    A target that is PADDING carries no loss.
    """

    step: int
    slot: int
    source: str
    modality: str
    symbols: np.ndarray  # uint16 [B, T + 1]
    row_ids: np.ndarray  # int64: the rows with a target in the slot


def num_micro_batches(symbols: int, batch_size: int, sequence_length: int) -> int:
    """Micro-batches of a window with `symbols` targets, as `pack_window` makes them."""
    return -(-symbols // (batch_size * sequence_length))


def pack_window(
    rows: Sequence[bytes],
    batch_size: int,
    sequence_length: int,
    shuffle_key: tuple[str | int, ...] | None,
) -> PackedWindow:
    """Every byte of every row, and an END_OF_DOCUMENT after it, becomes a target exactly once.

    Rows are permuted, then, once packed, the sequences; both as `shuffle_key` says, None for not
    at all. Rows of no bytes are left out.
    """
    rows = [row for row in rows if row]
    row_order = _order(len(rows), shuffle_key, "rows")
    rows = [rows[i] for i in row_order]
    lengths = np.array([len(row) + 1 for row in rows], np.int64)
    row_starts = np.concatenate([[0], np.cumsum(lengths)])
    num_symbols = int(row_starts[-1])

    num_sequences = -(-num_symbols // sequence_length)
    stream = np.full(num_sequences * sequence_length + 1, PADDING, np.uint16)
    stream[0] = END_OF_DOCUMENT
    stream[1 : num_symbols + 1] = np.frombuffer(b"\0".join([*rows, b""]), np.uint8)
    stream[row_starts[1:]] = END_OF_DOCUMENT

    order = _order(num_sequences, shuffle_key, "sequences")
    padded = num_micro_batches(num_symbols, batch_size, sequence_length) * batch_size
    sequences = np.full((padded, sequence_length + 1), PADDING, np.uint16)
    overlapping = np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)
    sequences[:num_sequences] = overlapping[::sequence_length][order]
    return PackedWindow(sequences, order, row_ids(rows), row_starts)


def slice_micro_batch(window: PackedWindow, index: int, batch_size: int) -> tuple:
    """(symbols uint16 [B, T + 1], row ids int64 in packed order) of micro-batch `index`; copies."""
    part = slice(index * batch_size, (index + 1) * batch_size)
    symbols = window.sequences[part].copy()
    sequence_length = symbols.shape[1] - 1
    begin = window.sequence_order[part] * sequence_length
    end = np.minimum(begin + sequence_length, window.row_starts[-1])
    first = np.searchsorted(window.row_starts, begin, side="right") - 1
    last = np.searchsorted(window.row_starts, end, side="left")
    touched = [np.arange(i, j) for i, j in zip(first, last, strict=True)]
    return symbols, window.row_ids[np.unique(np.concatenate(touched))]


def _order(count: int, shuffle_key: tuple[str | int, ...] | None, what: str) -> np.ndarray:
    if shuffle_key is None:
        return np.arange(count)
    return keyed_permutation(count, *shuffle_key, what)
