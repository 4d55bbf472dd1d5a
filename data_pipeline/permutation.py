"""Seeded permutations that any process, on any machine, computes alike.

numpy promises a stable stream of raw bits for its bit generators, but not for the methods of
`Generator`; so a permutation here is the argsort of raw Philox words. The key is a digest of plain
values (seed, names, numbers): Python's own `hash` differs between processes.
"""

import hashlib
import json

import numpy as np


def random_words(count: int, *key: str | int) -> np.ndarray:
    """uint64 [count] determined by `key` alone."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)


def keyed_permutation(count: int, *key: str | int) -> np.ndarray:
    """int64 [count]: the permutation of range(count) that `key` determines."""
    return np.argsort(random_words(count, *key), kind="stable")
