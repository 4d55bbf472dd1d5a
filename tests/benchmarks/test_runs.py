"""Benchmarks run to their end, small, and leave records that say how they were made."""

import json
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from arbitor.kernel import backend
from arbitor.modality import MODALITIES
from arbitor.vocab import CONTENT_SYMBOLS, END_OF_DOCUMENT, PADDING

TRAINING = "--width 64 --steps 2 --slots 1 --threads 1"
TEXT = f"{TRAINING} --layers 1 --context 32 --eval-slots 2 --seeds 0 --warmup 1"
RUNS = {  # a benchmark's arguments, what its record has of rows, and a key of each
    "learning": (f"{TEXT} --rules latent adamw --lr 1e-3", "runs", 2, "validation"),
    "parts": (f"{TEXT} --parts attention experts", "rows", 2, "validation"),
    "recall": (
        f"{TRAINING} --context 64 --window 8 --stride 4 --pairs 2 --sequences 4 "
        "--variants window dense",
        "runs",
        2,
        "recall",
    ),
    "media train": (
        f"{TRAINING} --layers 1 --head-layers 1 --sequences 4 --sources text code",
        "held_out",
        2,
        "loss",
    ),
    "media mixed": (
        f"{TRAINING} --layers 1 --head-layers 1 --sequences 4 --only text image",
        "runs",
        2,
        "held_out",
    ),
    "generation": (
        "--sizes 64x1 --batch 1 2 --prompt 20 --bytes 2 --stride 4 --window 8 --device cpu",
        "rows",
        4,
        "bytes_per_s",
    ),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """A benchmark is a process: it sets the threads and the backend of its own."""
    monkeypatch.setattr(backend, "_active", None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def inputs(tmp_path):
    """Of the benchmarks that read a file: the argument that names it."""
    random = np.random.default_rng(0)
    text, rows = tmp_path / "text.bin", tmp_path / "rows.safetensors"
    text.write_bytes(random.integers(97, 123, 4096, np.uint8).tobytes())
    tensors = {}
    for source in MODALITIES:
        for split, count in (("train", 16), ("held_out", 8)):
            symbols = np.full((count, 33), PADDING, np.uint16)
            symbols[:, 0] = END_OF_DOCUMENT
            symbols[:, 1:25] = random.integers(97, 123, (count, 24))
            if source == "image":
                symbols[:, 1:5] = CONTENT_SYMBOLS[source][1]
                content = random.integers(0, 256, (count, 4, 48), np.uint8)
                tensors[f"{source}.{split}.content"] = content
            tensors[f"{source}.{split}.symbols"] = symbols
    grids = {"image": {"patch": 4, "side": 2}, "video": {"patch": 4, "side": 2, "frames": 2}}
    save_file(tensors, rows, {"grids": json.dumps(grids)})
    return {"learning": f"--data {text}", "parts": f"--data {text}", "media": f"--rows {rows}"}


@pytest.mark.parametrize("benchmark", RUNS)
def test_a_small_run_leaves_a_record(benchmark, inputs, tmp_path, monkeypatch):
    arguments, where, count, key = RUNS[benchmark]
    name, *command = benchmark.split()
    out = tmp_path / "results" / "found.json"
    words = [*command, *f"{arguments} {inputs.get(name, '')}".split(), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *words])
    import_module(f"benchmarks.{name}").main()
    record = json.loads(out.read_text())
    assert record["command"].startswith(f"python -m benchmarks.{benchmark}")
    assert record["environment"]["torch"] and record["options"].get("steps", 2) == 2
    rows = record[where]
    rows = list(rows.values()) if isinstance(rows, dict) else rows
    assert len(rows) == count and all(key in row for row in rows)
    assert str(tmp_path.parent) not in out.read_text()
