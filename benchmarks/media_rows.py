"""Rows of the five sample sources in one file, as the data pipeline packs them, and slots of them.

The file is made where the decoders are; reading it takes NumPy and safetensors. Of each source it
holds `<source>.train.symbols` uint16 [R, T + 1], `<source>.train.content` uint8 [R, P, X] and the
same of `held_out`; the metadata `grids` says how patches stand in frames.
Shape letters: R rows, T positions, P places, X bytes of a place, B sequences of a slot.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from arbitor.batch import SlotBatch
from arbitor.encoder.image import PatchGrid
from arbitor.modality import MODALITIES
from arbitor.settings import build, parse_value, set_value
from arbitor.vocab import CONTENT_SYMBOLS, END_OF_DOCUMENT, NUM_BYTES, PADDING

DATA = {
    "batch_size": 64,
    "sequence_length": 128,
    "eval_fraction": 0.1,
    "eval_slots": 1,
    "image": {"size": 32, "patch": 4, "sequence_length": 128},
    "audio": {"seconds_max": 1.5, "sequence_length": 128},
    "video": {"size": 24, "patch": 6, "num_frames": 6, "frames_per_second": 3.0}
    | {"sequence_length": 128},
}
MOST_ROWS = 16_384  # of text and code, evenly over their sequences


def prepare(path: Path, overrides: list[str], storage: Path) -> None:
    """Writes the file; `overrides` are data.key=value."""
    from data_pipeline.index import index_sources  # needs the decoders, which reading does not
    from data_pipeline.plan import WindowKey
    from data_pipeline.run_data import RunData
    from data_pipeline.schema import DataConfig

    values = DATA | {
        "sources": {name: {"modality": name, "path": f"sample://{name}"} for name in MODALITIES}
    }
    values = {"data": values}
    for override in overrides:
        key, text = override.split("=", 1)
        set_value(values, key, parse_value(text))
    config = build(DataConfig, values["data"], "data")
    data = RunData(config, index_sources(config, storage=storage), seed=0)
    tensors = {}
    for source in MODALITIES:
        keys = [WindowKey(source, 0, 0, number) for number in range(len(data.windows[source]))]
        train = [data.task(key).read()[0] for key in keys]
        held_out = [task.read()[0] for task, _ in data.held_out_windows(source)]
        for split, windows in (("train", train), ("held_out", held_out)):
            for name, rows in _rows(windows).items():
                tensors[f"{source}.{split}.{name}"] = rows
                print(f"{source}.{split}.{name}", rows.shape, flush=True)
    video = config.video
    grids = {
        "image": {"patch": config.image.patch, "side": config.image.size // config.image.patch},
        "video": {
            "patch": video.patch,
            "side": video.size // video.patch,
            "frames": video.num_frames,
            "frames_per_second": video.frames_per_second,
        },
    }
    save_file(tensors, path, {"grids": json.dumps(grids)})
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _rows(windows: list) -> dict[str, np.ndarray]:
    """The sequences of the windows without padding."""
    symbols = np.concatenate([window.sequences for window in windows])
    used = np.nonzero(symbols[:, 0] != PADDING)[0]
    if windows[0].content is not None:
        content = np.concatenate([window.content for window in windows])[used]
        return {"symbols": symbols[used], "content": content}
    stride = -(-len(used) // MOST_ROWS)
    return {"symbols": symbols[used][::stride]}


@dataclass(frozen=True)
class Rows:
    """One split of one source."""

    source: str
    symbols: np.ndarray  # uint16 [R, T + 1]
    content: np.ndarray | None  # uint8 [R, P, X]

    def slot(
        self, number: int, step: int, slot: int, batch_size: int, seed: int, device: str
    ) -> SlotBatch:
        """The `number`th slot of a run of this source: rows in a new order every epoch."""
        first = number * batch_size
        taken = [self._row(first + i, seed) for i in range(batch_size)]
        return self.batch(taken, step, slot, device)

    def batches(self, batch_size: int, device: str) -> list[SlotBatch]:
        """All rows in whole slots, those that are over left out, in order."""
        starts = range(0, len(self.symbols) - batch_size + 1, batch_size)
        return [
            self.batch(range(start, start + batch_size), 0, number, device)
            for number, start in enumerate(starts)
        ]

    def batch(self, rows, step: int, slot: int, device: str) -> SlotBatch:
        rows = np.asarray(rows)
        return SlotBatch.from_symbols(
            self.symbols[rows],
            step=step,
            slot=slot,
            source=self.source,
            modality=self.source,
            content=None if self.content is None else self.content[rows],
            device=device,
        )

    def _row(self, number: int, seed: int) -> int:
        epoch, place = divmod(number, len(self.symbols))
        if (seed, epoch) not in self._orders:
            self._orders.clear()
            order = np.random.default_rng([seed, epoch]).permutation(len(self.symbols))
            self._orders[seed, epoch] = order
        return int(self._orders[seed, epoch][place])

    @cached_property
    def _orders(self) -> dict[tuple[int, int], np.ndarray]:
        return {}

    @cached_property
    def captions(self) -> list[str]:
        """The bytes of each row."""
        return [bytes(s for s in row.tolist() if s < NUM_BYTES).decode() for row in self.symbols]

    @cached_property
    def used(self) -> list[np.ndarray]:
        """uint8 [P, X] of each row: the places that it has."""
        place = CONTENT_SYMBOLS[self.source][1]
        counts = (self.symbols == place).sum(1).tolist()
        return [content[:count] for content, count in zip(self.content, counts, strict=True)]


@dataclass(frozen=True)
class Source:
    train: Rows
    held_out: Rows

    def baseline(self) -> float:
        """What is to be beaten: counts of symbols or of codes alone, the best scalar and mean."""
        rows = self.train
        if rows.content is None:
            counts = np.bincount(rows.symbols[:, 1:].ravel(), minlength=PADDING + 1)
            return _entropy(counts[: END_OF_DOCUMENT + 1])
        if rows.source == "audio":
            codes = np.concatenate(rows.used)
            return float(np.mean([_entropy(np.bincount(column)) for column in codes.T]))
        # v = a(s) x + b(s, place) of x = (1 - s) noise + s values errs by u / (s^2 u + (1 - s)^2)
        # with the variance u of the values around their place's mean.
        variance = (rows.content / np.float32(127.5)).var(axis=0).mean()
        s = np.arange(64) / 64
        return float((variance / (s**2 * variance + (1 - s) ** 2)).mean())


def read_rows(path: Path) -> tuple[dict[str, Source], dict[str, PatchGrid]]:
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        grids = json.loads(file.metadata()["grids"])

    def rows(source: str, split: str) -> Rows:
        key = f"{source}.{split}"
        return Rows(source, tensors[f"{key}.symbols"], tensors.get(f"{key}.content"))

    sources = {name: Source(rows(name, "train"), rows(name, "held_out")) for name in MODALITIES}
    return sources, {name: PatchGrid(**grid) for name, grid in grids.items()}


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
