"""The sample shards: the same bytes every time, small, real and ready to be indexed."""

import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arbitor.errors import UserError
from arbitor.modality import BYTE_MODALITIES, MODALITIES
from data_pipeline import sample
from data_pipeline.run_data import held_out_slots, read_slots
from data_pipeline.sample import ensure_sample
from data_pipeline.schema import SourceConfig
from data_pipeline.statistics import bigram_entropy, unigram_entropy
from tests.data_pipeline.shards import run_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    for modality in MODALITIES:
        ensure_sample(modality, folder)
    return folder


def test_shards_are_small_and_many_grouped(folder):
    for modality in MODALITIES:
        shards = sorted((folder / modality).iterdir())
        assert len(shards) == 3
        assert 0.5e6 < sum(shard.stat().st_size for shard in shards) < 8e6
        for shard in shards:
            assert pq.read_metadata(shard).num_row_groups > 2


def test_the_same_python_makes_the_same_bytes(folder, tmp_path):
    again = ensure_sample("code", tmp_path)
    for shard in (folder / "code").iterdir():
        assert shard.read_bytes() == (again / shard.name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_media_have_the_hugging_face_layout(folder):
    media = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for modality in ("image", "audio", "video"):
        schema = pq.read_schema(folder / modality / "part-0-of-3.parquet")
        expected = [(modality, media), ("text", pa.string())]
        if modality == "audio":
            expected.append(("sampling_rate", pa.int64()))
        assert schema.equals(pa.schema(expected))
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert features[modality] == {"_type": modality.capitalize()}
        assert list(features) == schema.names


def test_a_complete_folder_is_reused_and_a_partial_one_is_never_seen(folder, tmp_path, monkeypatch):
    begin = time.process_time()
    assert ensure_sample("text", folder) == folder / "text"
    assert time.process_time() - begin < 0.1

    def fail(*_):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(sample, "_write_shards", fail)
    with pytest.raises(RuntimeError):
        ensure_sample("code", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_what_it_wrote(folder, capsys):
    with pytest.raises(UserError, match="--times: expected at least 1, got 0"):
        sample.sample_command(["--out", str(folder), "--times", "0"])
    assert sample.sample_command(["--out", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and all("rows" in line for line in lines)


def test_text_and_code_make_slots_and_have_sensible_entropies(folder):
    sources = {name: SourceConfig(name, f"sample://{name}") for name in BYTE_MODALITIES}
    (folder / "samples").symlink_to(folder)
    data = run_data(folder, sources)
    assert {slot.source for slot in read_slots(data, 0, 5, 0, 1)} == {"text", "code"}
    for name in sources:
        assert len(held_out_slots(data, name)) > 10
        assert 2.0 < bigram_entropy(data, name) + 0.3 < unigram_entropy(data, name) < 3.6
