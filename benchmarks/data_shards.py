"""Shards to time the data pipeline with: pictures, sounds, videos and prose of everyday sizes."""

import hashlib
import io
import shutil
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

from data_pipeline import run_data as run_data_module
from data_pipeline.decode.audio import AudioConfig
from data_pipeline.index import index_sources
from data_pipeline.run_data import RunData
from data_pipeline.schema import DataConfig, SourceConfig

DISTINCT = 64  # contents; the rows repeat them with captions of their own
ROWS = {"image": 8192, "audio": 4096, "video": 1024}
TEXT_BYTES = 256 << 20
SHARDS = 4
ABOUT = {
    "image": "JPEG of 256 x 256",
    "audio": "FLAC of 4 s at 16 kHz",
    "video": "H.264 in MP4, 16 frames of 128 x 128",
    "text": "Parquet of rows of about 4 kB",
}


def timed_data(folder: Path, weights: dict[str, float], decode_tasks: int) -> RunData:
    """Slots of 16 x 1024 positions from shards below `folder`, written where they are missing."""
    sources = {
        name: SourceConfig(name, str(shards(name, folder)), weight)
        for name, weight in weights.items()
    }
    config = DataConfig(
        sources,
        batch_size=16,
        sequence_length=1024,
        decode_tasks=decode_tasks,
        audio=AudioConfig(seconds_max=4.0, sequence_length=256),
    )
    config.validate()
    return RunData(config, index_sources(config, folder), seed=0)


def small_windows(folder: Path) -> RunData:
    """Text in windows of four slots of 128 positions: many in little time."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"row {i} ".ljust(126, ".") for i in range(4096)]
    pq.write_table(pa.table({"text": rows}), folder / "rows.parquet", row_group_size=4)
    source = SourceConfig("text", str(folder / "rows.parquet"))
    config = DataConfig({"text": source}, batch_size=1, sequence_length=128)
    data = RunData(config, index_sources(config, folder), seed=0)
    with patch.object(run_data_module, "WINDOW_SYMBOLS", 128):
        assert len(data.windows["text"]) == 1004  # kept in the object, and so sent to the workers
    return data


def shards(modality: str, folder: Path) -> Path:
    """The folder of the whole shards that this file makes now, whatever it made before."""
    sizes = repr((ROWS, TEXT_BYTES, DISTINCT, SHARDS)).encode()
    digest = hashlib.sha256(sizes + Path(__file__).read_bytes()).hexdigest()
    whole = folder / f"{modality}-{digest[:12]}"
    if not whole.exists():
        partial = whole.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(modality, partial)
        partial.rename(whole)
    return whole


def _write(modality: str, folder: Path) -> None:
    if modality == "text":
        for i in range(SHARDS):
            rows = _prose(i, TEXT_BYTES // SHARDS)
            pq.write_table(pa.table({"text": rows}), folder / f"{i}.parquet", row_group_size=256)
        return
    make = {"image": _picture, "audio": _sound, "video": _video}[modality]
    contents = [make(np.random.default_rng(i)) for i in range(DISTINCT)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for i in range(SHARDS):
        numbers = range(i * ROWS[modality] // SHARDS, (i + 1) * ROWS[modality] // SHARDS)
        media = [{"bytes": contents[n % DISTINCT], "path": None} for n in numbers]
        table = pa.table({modality: pa.array(media, kind), "text": [f"row {n}" for n in numbers]})
        pq.write_table(table, folder / f"{i}.parquet", row_group_size=64)


def _prose(seed: int, num_bytes: int) -> list[str]:
    """Rows of words, no two rows alike."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(ord("a"), ord("z") + 1, (5000, 12), np.uint8)
    lengths = rng.integers(2, 12, 5000)
    words = [bytes(row[:n]).decode() for row, n in zip(letters, lengths, strict=True)]
    rows, total = [], 0
    while total < num_bytes:
        rows.append(" ".join(words[i] for i in rng.integers(0, 5000, rng.integers(100, 1000))))
        total += len(rows[-1])
    return rows


def _scene(rng: np.random.Generator, size: int) -> Image.Image:
    """Coloured clouds with some grain: about 11 kB as a JPEG of 256 x 256."""
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-6, 7, (size, size, 1), np.int16)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def _picture(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    _scene(rng, 256).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def _sound(rng: np.random.Generator) -> bytes:
    time = np.arange(4 * 16_000) / 16_000
    hertz = rng.uniform(100, 2000, 8)[:, None]
    wave = np.sin(2 * np.pi * hertz * time).mean(axis=0) + rng.normal(0, 0.01, len(time))
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.5 * wave, 16_000, format="FLAC")
    return buffer.getvalue()


def _video(rng: np.random.Generator) -> bytes:
    """A scene that moves to the side."""
    scene = np.asarray(_scene(rng, 192))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "veryfast"})
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for i in range(16):
            frame = np.ascontiguousarray(scene[32:160, 4 * i : 4 * i + 128])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
