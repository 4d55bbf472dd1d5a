"""Are these shards fit to train on? `python -m data_pipeline.lint CONFIG|PATH [key=value ...]`.

Reads and decodes every row as a run would, in as many processes as there are cores, and goes on
after what it finds. Duplicates are rows of a source with the same content; captions aside. Their
hashes are kept until the end: 16 bytes a row.
"""

import argparse
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from arbitor.errors import UserError
from arbitor.settings import build
from data_pipeline.check import Findings, Listing, Shard, check_unit, list_shard
from data_pipeline.command import end_with, is_override, read_settings, set_values
from data_pipeline.files import FoundFile, find_files
from data_pipeline.format.guess import guess_modality
from data_pipeline.format.open_shard import ROW_SUFFIXES
from data_pipeline.index import choose_shards, find_shards
from data_pipeline.lint_report import SourceReport, describe_source
from data_pipeline.progress import Progress
from data_pipeline.schema import DataConfig, SourceConfig

YAML_SUFFIXES = (".yaml", ".yml")
EPILOG = """exit code: 0 clean, 1 bad rows or shards, 2 a mistake in configuration or command.
CONFIG is a run's YAML file; key.path=value overrides it: data.sources.image.weight=0.1.
PATH is a file, a folder or a glob; what its shards hold is seen from their columns, and
modality=code, text_column=content, content_column=jpg say otherwise."""


def lint_command(words: list[str]) -> int:
    options = _parser().parse_intermixed_args(words)
    names = [word for word in options.words if not is_override(word)]
    if len(names) != 1:
        raise UserError(f"expected one CONFIG or PATH, got {' and '.join(names) or 'none'}")
    if names[0].lower().endswith(YAML_SUFFIXES):
        shards, allowed = _shards_of_config(options.words)
    else:
        shards, allowed = _shards_of_path(names[0], options.words), DataConfig.max_bad_fraction
    reports = _check(shards)
    for report in reports:
        print(describe_source(report, allowed) + "\n")
    bad = sum(len(report.faults) for report in reports)
    if options.bad_rows:
        _write_bad_rows(options.bad_rows, reports)
        print(f"bad rows written to {options.bad_rows}")
    rows = sum(report.rows for report in reports)
    broken = sum(len(report.broken) for report in reports)
    if not bad and not broken:
        print(f"clean: all {rows:,} rows can be decoded")
        return 0
    print(f"not clean: {bad:,} bad rows of {rows:,}, {broken:,} bad shards of {len(shards):,}")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.lint",
        description="Reads and decodes every row of shards as a run would.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="+", metavar="CONFIG | PATH | key.path=value")
    parser.add_argument(
        "--bad-rows", type=Path, metavar="FILE", help="write all of them, as JSON lines"
    )
    return parser


def _shards_of_config(words: Sequence[str]) -> tuple[list[Shard], float]:
    settings = read_settings(words)
    data, storage = settings.data, Path(settings.storage)
    for name in sorted(set(data.sources) - set(data.active_sources)):
        print(f"{name}: weight 0, not checked; data.sources.{name}.weight=0.1 includes it\n")
    shards = []
    for name, source in data.active_sources.items():
        files = find_shards(f"data.sources.{name}", source, storage)
        shards += _shards(name, source, files, data)
    return shards, data.max_bad_fraction


def _shards_of_path(path: str, words: Sequence[str]) -> list[Shard]:
    """One source of each modality that is found there."""
    values = {"path": path}
    set_values(values, words)
    build(SourceConfig, values)
    files = choose_shards("PATH", path, values.get("modality", "text"), find_files("PATH", path))
    with ThreadPoolExecutor() as pool:
        guesses = list(pool.map(guess_modality, (file.place for file in files)))
    both = list(zip(files, guesses, strict=True))
    if any(guess != "text" for guess in guesses):  # of media only the files that hold rows
        both = [(f, guess) for f, guess in both if f.place.lower().endswith(ROW_SUFFIXES)]
    if not both:
        kinds = " and ".join(sorted({guess for guess in guesses if guess != "text"}))
        raise UserError(
            f"PATH: no shards in {path}; put {kinds} rows in {', '.join(ROW_SUFFIXES)} files"
        )
    shards = []
    for file, guess in both:
        source = build(SourceConfig, {"modality": guess} | values)
        _validate(source)
        shards += _shards(source.modality, source, [file], DataConfig())
    return shards


def _validate(source: SourceConfig) -> None:
    try:
        DataConfig({"PATH": source}).validate()
    except UserError as error:
        raise UserError(str(error).removeprefix("data.sources.PATH.")) from error


def _shards(
    name: str, source: SourceConfig, files: Sequence[FoundFile], data: DataConfig
) -> Iterator[Shard]:
    media = data.media(source.modality)
    for file in files:
        yield Shard(name, file.place, file.size, source.modality, source.columns, media)


def _check(shards: Sequence[Shard]) -> list[SourceReport]:
    """Lists, then checks; results are taken in as they come and put in order at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipeline.check"])
    cores = len(os.sched_getaffinity(0))
    with (
        Progress("checking", sum(shard.num_bytes for shard in shards)) as progress,
        ProcessPoolExecutor(cores, context, initializer=_leave_interrupts_alone) as pool,
    ):
        try:
            listings = _list(pool, shards)
            found = _collect(_submit(pool, shards, listings, progress), shards, progress)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    reports = {shard.source: SourceReport(shard.source, shard.modality) for shard in shards}
    for number, (shard, listing) in enumerate(zip(shards, listings, strict=True)):
        units = [found[number, unit] for unit in range(len(listing.units))]
        reports[shard.source].add(shard, listing, units)
    return list(reports.values())


def _list(pool: ProcessPoolExecutor, shards: Sequence[Shard]) -> list[Listing]:
    places = {}
    try:
        with suppress(BrokenProcessPool):  # whose it is, their futures say
            for shard in shards:
                places[pool.submit(list_shard, shard)] = shard.place
        return [future.result() for future in places]
    except BrokenProcessPool as error:
        raise _killed(places) from error


class _Part(NamedTuple):
    """Numbers of a shard and of its unit, and the unit's part of the shard's bytes."""

    shard: int
    unit: int
    num_bytes: float


def _submit(
    pool: ProcessPoolExecutor,
    shards: Sequence[Shard],
    listings: Sequence[Listing],
    progress: Progress,
) -> dict[Future, _Part]:
    parts = {}
    for number, (shard, listing) in enumerate(zip(shards, listings, strict=True)):
        if not listing.units:
            progress.advance(shard.num_bytes, 0)
        for unit, content in enumerate(listing.units):
            part = _Part(number, unit, shard.num_bytes / len(listing.units))
            try:
                parts[pool.submit(check_unit, shard, content)] = part
            except BrokenProcessPool:  # by one that was submitted before: `_collect` tells
                return parts
    return parts


def _collect(
    parts: dict[Future, _Part], shards: Sequence[Shard], progress: Progress
) -> dict[tuple[int, int], Findings]:
    """By numbers of shard and unit. Raises UserError where a process was killed."""
    found = {}
    try:
        for future in as_completed(parts):
            shard, unit, num_bytes = parts[future]
            found[shard, unit] = future.result()
            progress.advance(num_bytes, found[shard, unit].rows)
    except BrokenProcessPool as error:
        raise _killed(
            {future: shards[part.shard].place for future, part in parts.items()}
        ) from error
    return found


def _killed(places: Mapping[Future, str]) -> UserError:
    broken = list(dict.fromkeys(place for future, place in places.items() if future.exception()))
    more = f" or a later one ({len(broken)} in all)" if len(broken) > 1 else ""
    return UserError(
        f"{broken[0]}{more}: a process was killed while it read this; check it alone, with more"
        " memory, or take it out"
    )


def _write_bad_rows(path: Path, reports: Sequence[SourceReport]) -> None:
    """In the form of a run's bad-rows-*.jsonl; `row` is null for a shard that cannot be read."""
    try:
        with open(path, "w") as file:
            for report in reports:
                entries = [(place, None, reason) for place, reason in report.broken]
                for shard, row, reason in [*entries, *report.faults]:
                    entry = {"source": report.source, "shard": shard, "row": row, "reason": reason}
                    file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise UserError(f"--bad-rows {path}: cannot be written ({error.strerror})") from error


def _leave_interrupts_alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's


if __name__ == "__main__":
    end_with(lint_command)
