"""What lint knows of a source, and how it says it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from arbitor.modality import BYTE_MODALITIES
from data_pipeline.check import Findings, Listing, Shard
from data_pipeline.command import in_units
from data_pipeline.pack import Fault
from data_pipeline.run_data import WINDOW_SYMBOLS

SHOWN = 10  # bad rows and duplicates of a source; --bad-rows writes all of them
BAR = 30
GROUP_BYTES = 64 << 20  # of text in a row group: larger ones are told
SIZES = {"image": "shorter side, pixels", "audio": "seconds", "video": "seconds"}


@dataclass
class SourceReport:
    """Sums over the units of a source's shards; `add` takes the shards in their order."""

    source: str
    modality: str
    shards: list[str] = field(default_factory=list)
    schemas: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, str]] = field(default_factory=list)  # (shard, why it cannot be read)
    faults: list[Fault] = field(default_factory=list)
    rows: int = 0
    num_bytes: int = 0
    positions: int = 0
    group_bytes: int = 0
    seconds: float = 0.0
    empty: int = 0
    truncated: int = 0
    sizes: Counter[int] = field(default_factory=Counter)
    _hashes: list[np.ndarray] = field(default_factory=list)
    _places: list[np.ndarray] = field(default_factory=list)  # int64 [n, 2]: shard and row

    def add(self, shard: Shard, listing: Listing, units: Sequence[Findings]) -> None:
        number, first_row = len(self.shards), 0
        self.shards.append(shard.place)
        if listing.problem:
            self.broken.append((shard.place, listing.problem))
        elif listing.schema:
            self.schemas[listing.schema] += 1
        self.group_bytes = max(self.group_bytes, listing.group_bytes)
        for unit in units:
            for name in ("rows", "num_bytes", "positions", "seconds", "empty", "truncated"):
                setattr(self, name, getattr(self, name) + getattr(unit, name))
            self.sizes += unit.sizes
            self.faults += [Fault(shard.place, first_row + row, why) for row, why in unit.faults]
            rows = first_row + np.array(unit.hashed_rows, np.int64)
            self._hashes += unit.hashes
            self._places.append(np.stack([np.full_like(rows, number), rows], axis=1))
            first_row += unit.rows

    def duplicates(self) -> list[tuple[tuple[str, int], tuple[str, int]]]:
        """Places (shard, row) of each row seen before, and of the first row with its content."""
        if not self._hashes:
            return []
        _, first, group = np.unique(
            np.concatenate(self._hashes), return_index=True, return_inverse=True
        )
        again = np.nonzero(first[group] != np.arange(len(group)))[0]
        places = np.concatenate(self._places)
        return [(self._place(places[i]), self._place(places[first[group[i]]])) for i in again]

    def _place(self, place: np.ndarray) -> tuple[str, int]:
        return self.shards[place[0]], int(place[1])


def describe_source(report: SourceReport, allowed: float) -> str:
    """Some lines; `allowed` is data.max_bad_fraction."""
    lines = [f"{report.source}: {report.rows:,} rows in {len(report.shards):,} shards"]
    for schema, count in report.schemas.most_common():
        others = f"  ({count:,} shards)" if len(report.schemas) > 1 else ""
        lines.append(f"  columns     {schema}{others}")
    lines.append(f"  bytes       {report.num_bytes:,} ({in_units(report.num_bytes)})")
    if report.seconds:
        lines.append(f"  seconds     {report.seconds:,.1f} ({report.seconds / 3600:,.2f} h)")
    lines.append(f"  positions   {report.positions:,}")
    if report.modality in BYTE_MODALITIES:
        lines.append(f"  empty rows  {report.empty:,}")
        if report.group_bytes > GROUP_BYTES:
            lines.append(
                f"  row groups  up to {in_units(report.group_bytes)} of text, each read whole for"
                f" every window of {in_units(WINDOW_SYMBOLS)}; write smaller ones (row_group_size)"
            )
    else:
        lines.append(f"  captions    {report.truncated:,} too long for the sequence, to be cut")
    duplicates = report.duplicates()
    lines.append(f"  duplicates  {len(duplicates):,}")
    for again, first in duplicates[:SHOWN]:
        lines.append(f"    {_name(*again)} is {_name(*first)}")
    lines += _more(len(duplicates))
    lines += _histogram(report)
    lines += _bad_rows(report, allowed)
    return "\n".join(lines)


def _histogram(report: SourceReport) -> Iterator[str]:
    """A line a power of two, from the smallest size seen to the largest."""
    sizes = report.sizes
    if not sizes:
        return
    yield f"  {SIZES.get(report.modality, 'bytes a row')}"
    exponents = range(min(sizes), max(sizes) + 1)
    labels = [f"{2.0**exponent:,.6g} to {2.0 ** (exponent + 1):,.6g}" for exponent in exponents]
    width, most = max(map(len, labels)), max(sizes.values())
    digits = len(f"{most:,}")
    for exponent, label in zip(exponents, labels, strict=True):
        bar = "#" * -(-sizes[exponent] * BAR // most)
        yield f"    {label:>{width}}  {sizes[exponent]:>{digits},}  {bar}".rstrip()


def _bad_rows(report: SourceReport, allowed: float) -> Iterator[str]:
    share = len(report.faults) / max(1, report.rows)
    verdict = ""
    if report.faults and report.modality in BYTE_MODALITIES:
        verdict = f" ({share:.2%}; a run refuses the shards of {report.modality} that hold them)"
    elif report.faults:
        over = "above" if share > allowed else "within"
        verdict = f" ({share:.2%}, {over} data.max_bad_fraction={allowed})"
    yield f"  bad rows    {len(report.faults):,}{verdict}"
    runs = list(_runs(report.faults))
    for first, last in runs[:SHOWN]:
        rows = f"row {first.row}" if first == last else f"rows {first.row} to {last.row}"
        yield f"    {first.shard} {rows}: {first.reason}"
    yield from _more(len(runs))
    if report.broken:
        yield f"  bad shards  {len(report.broken):,}"
        yield from (f"    {place}: {reason}" for place, reason in report.broken[:SHOWN])
        yield from _more(len(report.broken))


def _runs(faults: Sequence[Fault]) -> Iterator[tuple[Fault, Fault]]:
    """First and last of consecutive rows with the same reason."""

    def key(item: tuple[int, Fault]) -> tuple:
        number, fault = item
        return fault.shard, fault.reason, fault.row - number

    for _, run in groupby(enumerate(faults), key):
        members = [fault for _, fault in run]
        yield members[0], members[-1]


def _more(count: int) -> list[str]:
    return [f"    and {count - SHOWN:,} more"] if count > SHOWN else []


def _name(shard: str, row: int) -> str:
    return f"{shard.rpartition('/')[2]} row {row}"
