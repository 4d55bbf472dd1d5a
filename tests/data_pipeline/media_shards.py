"""Small shards of all five modalities, whose rows say their own number, in every format."""

import base64
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbitor import vocab
from data_pipeline.decode.audio import AudioConfig
from data_pipeline.decode.image import ImageConfig
from data_pipeline.decode.video import VideoConfig
from data_pipeline.run_data import RunData
from data_pipeline.schema import SourceConfig
from tests.data_pipeline.media import encode_audio, encode_image, encode_video
from tests.data_pipeline.shards import numbered_rows, run_data, write_jsonl, write_parquet

SHAPE = {  # 128 positions a slot
    "batch_size": 2,
    "sequence_length": 64,
    "image": ImageConfig(size=16, patch=8, sequence_length=16),
    "audio": AudioConfig(seconds_max=0.2, sequence_length=32),
    "video": VideoConfig(size=16, patch=8, num_frames=2, frames_per_second=4, sequence_length=32),
}
ENDINGS = {"image": "png", "audio": "flac", "video": "mp4"}
BORDERS = {
    "image": (vocab.BEGIN_IMAGE, vocab.PATCH, vocab.END_IMAGE),
    "audio": (vocab.BEGIN_AUDIO, vocab.AUDIO_FRAME, vocab.END_AUDIO),
    "video": (vocab.BEGIN_VIDEO, vocab.PATCH, vocab.END_VIDEO),
}

Rows = list[tuple[bytes | None, str | None]]


def media_rows(modality: str, count: int, start: int = 0) -> Rows:
    """(encoded content, caption 'n17.') of `count` rows."""
    makers = {"image": _image, "audio": _audio, "video": _video}
    return [(makers[modality](n), f"n{n}.") for n in range(start, start + count)]


def _image(n: int) -> bytes:
    return encode_image(np.full((16, 16, 3), n % 256, np.uint8), "PNG")


def _audio(n: int) -> bytes:
    time = np.arange(16_000 * (1 + n % 4) // 20) / 16_000  # 50 to 200 ms
    return encode_audio(0.5 * np.sin(2 * np.pi * (200 + 20 * n) * time), 16_000, "FLAC")


def _video(n: int) -> bytes:
    return encode_video(np.full((4, 32, 32, 3), n % 256, np.uint8), 4)


def write_media_parquet(path: Path, rows: Rows, modality: str, group: int = 8) -> None:
    content = [{"bytes": data, "path": None} for data, _ in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "id": range(len(rows)),
            modality: pa.array(content, kind),
            "text": pa.array([text for _, text in rows], pa.string()),
        }
    )
    pq.write_table(table, path, row_group_size=group)


def write_plain_binary(path: Path, rows: Rows, modality: str) -> None:
    columns = {modality: [data for data, _ in rows], "text": [text for _, text in rows]}
    pq.write_table(pa.table(columns), path, row_group_size=5)


def write_media_jsonl(path: Path, rows: Rows, modality: str) -> None:
    """Every other row as a file beside the shard."""
    with open(path, "w") as file:
        for i, (data, text) in enumerate(rows):
            value = {"bytes": base64.b64encode(data).decode()}
            if i % 2:
                value = f"files of {path.stem}/{i}.{ENDINGS[modality]}"
                (path.parent / value).parent.mkdir(exist_ok=True)
                (path.parent / value).write_bytes(data)
            file.write(json.dumps({modality: value, "text": text}) + "\n")


def write_tar(path: Path, rows: Rows, modality: str) -> None:
    """Every other caption as .json; a folder among the members."""
    with tarfile.open(path, "w") as tar:
        tar.addfile(_member("train", b"", tarfile.DIRTYPE))
        for i, (data, text) in enumerate(rows):
            ending, caption = ("json", json.dumps({"text": text})) if i % 2 else ("txt", text)
            for name, content in ((ENDINGS[modality], data), (ending, caption.encode())):
                member = _member(f"train/{i:05}.{name}", content)
                tar.addfile(member, io.BytesIO(content))


def _member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content), kind
    return member


WRITERS = {
    "struct.parquet": write_media_parquet,
    "binary.parquet": write_plain_binary,
    "rows.jsonl": write_media_jsonl,
    "rows.tar": write_tar,
}


def five_sources(folder: Path) -> dict[str, SourceConfig]:
    """A source of each modality in `folder`, images in every format, a few tens of rows each."""
    write_parquet(folder / "text.parquet", numbered_rows(300))
    write_jsonl(folder / "code.jsonl", numbered_rows(100, "code"))
    (folder / "images").mkdir()
    for i, (name, write) in enumerate(WRITERS.items()):
        write(folder / "images" / name, media_rows("image", 12, 12 * i), "image")
    write_tar(folder / "audio.tar", media_rows("audio", 40), "audio")
    write_media_parquet(folder / "video.parquet", media_rows("video", 20), "video")
    weights = {"text": 0.3, "code": 0.1, "image": 0.3, "audio": [[0, 0.0], [20, 0.3]], "video": 0.1}
    paths = {
        "text": "text.parquet",
        "code": "code.jsonl",
        "image": "images",
        "audio": "audio.tar",
        "video": "video.parquet",
    }
    return {
        name: SourceConfig(name, str(folder / paths[name]), weight)
        for name, weight in weights.items()
    }


def five_source_data(folder: Path, **config) -> RunData:
    return run_data(folder, five_sources(folder), seed=3, **SHAPE, **config)


def media_data(path: Path, modality: str, storage: Path, **config) -> RunData:
    source = SourceConfig(modality, str(path))
    return run_data(storage, {modality: source}, seed=5, **(SHAPE | config))


def captions(symbols: np.ndarray) -> list[str]:
    """The bytes of each sequence that holds any row, in order."""
    return [bytes(s for s in row.tolist() if s < 256).decode() for row in symbols if _is_row(row)]


def _is_row(sequence: np.ndarray) -> bool:
    return sequence[0] != vocab.PADDING
