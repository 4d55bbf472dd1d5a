"""How predictable a source is by counting alone: the bars that a model must get under."""

from dataclasses import replace

import numpy as np

from arbitor.vocab import END_OF_DOCUMENT
from data_pipeline.plan import WindowKey
from data_pipeline.run_data import RunData

SAMPLE_SYMBOLS = 4 << 20
NUM_SYMBOLS = END_OF_DOCUMENT + 1


def unigram_entropy(run_data: RunData, source: str) -> float:
    """Nats per symbol, of a sample of the training rows of `source` in any order."""
    counts = np.bincount(_training_symbols(run_data, source), minlength=NUM_SYMBOLS)
    return _entropy(counts)


def bigram_entropy(run_data: RunData, source: str) -> float:
    """Nats per symbol that stay when the symbol before is known."""
    symbols = _training_symbols(run_data, source).astype(np.int64)
    pairs = np.bincount(symbols[:-1] * NUM_SYMBOLS + symbols[1:])
    return _entropy(pairs) - _entropy(np.bincount(symbols[:-1]))


def _training_symbols(run_data: RunData, source: str) -> np.ndarray:
    """uint16: windows evenly spaced over the source, up to SAMPLE_SYMBOLS or one window."""
    num_windows = len(run_data.windows[source])
    mean = run_data.manifests[source].symbols / num_windows
    count = max(1, min(num_windows, int(SAMPLE_SYMBOLS / mean)))
    parts = []
    for k in range(count):
        task = run_data.task(WindowKey(source, 0, 0, k * num_windows // count))
        window, _ = replace(task, shuffle_key=None).read()
        parts.append(window.sequences[:, 1:].ravel()[: window.row_starts[-1]])
    return np.concatenate(parts)


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
