"""What a time on the GPU is held against."""

import torch

from benchmarks.kernels import Row, line_of, time_row
from benchmarks.timing import STREAM_BLOCK, Ceilings, stream

CEILINGS = Ceilings({"copy_": 2.0, "add": 4.0}, bfloat16=10.0, fp8=20.0, int8=40.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_floor_is_the_slower_of_bytes_by_the_fastest_stream_and_operations():
    assert CEILINGS.floor(8, 20, "fp8") == 2  # 2 s of bytes beside 1 s of operations
    assert CEILINGS.floor(8, 100, "fp8") == 5
    assert CEILINGS.floor(8, 100, "int8") == 2.5
    assert CEILINGS.floor(8, 100, "bfloat16") == 10


def test_a_row_beyond_the_ceiling_is_marked(monkeypatch):
    monkeypatch.setattr("benchmarks.kernels.seconds", lambda calls: calls[0]())
    for took, marked in ((2.0, False), (1.92, False), (1.0, True)):
        row = time_row(Row("op", [lambda t=took: t], {}, num_bytes=8), CEILINGS)
        assert row["share_of_ceiling"] == 2 / took and row["above_ceiling"] == marked
        assert ("ABOVE" in line_of(row)) == marked


def test_the_stream_copies():
    source = torch.randint(1 << 30, (2 * STREAM_BLOCK + 7,), dtype=torch.int32, device=DEVICE)
    target = torch.zeros(source.numel() + 1, dtype=torch.int32, device=DEVICE)
    stream(source, target[:-1])
    assert target[:-1].equal(source) and target[-1] == 0
