"""Row ids: what names a row is its content, so ids can be compared between shards and runs."""

import hashlib
from collections.abc import Iterable

import numpy as np


def row_ids(rows: Iterable[bytes]) -> np.ndarray:
    """int64 [R]: a 64-bit hash of each row's bytes."""
    digests = (hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), "<i8")


def media_row_ids(rows: Iterable[tuple[bytes, bytes]]) -> np.ndarray:
    """int64 [R]: a 64-bit hash of each row's encoded content and its text, the first two fields."""
    return row_ids(len(row[1]).to_bytes(8, "little") + row[1] + row[0] for row in rows)


def digest_of(ids: np.ndarray) -> str:
    """Hex digest of rows in order, made from their ids."""
    return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=16).hexdigest()


def join_digests(digests: Iterable[str]) -> str:
    """Hex digest of segments in order, made from theirs."""
    return hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()
