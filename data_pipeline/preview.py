"""What the model will see: `python -m data_pipeline.preview CONFIG --out DIR [key=value ...]`.

Reads the first slots of each source as the run will and turns them back into text, pictures, sound
and film: what was lost on the way in is lost here as well.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from arbitor.errors import UserError
from data_pipeline.command import end_with, open_data, read_settings
from data_pipeline.layout import MediaConfig
from data_pipeline.plan import SlotPlan, WindowKey
from data_pipeline.preview_files import SeenSequence, write_source
from data_pipeline.run_data import RunData, read_slots

SEQUENCES = 16  # of each source, where the run has so many
ABOUT = """Writes what the model will see in the first slots of each source: text, contact sheets,
wav and mp4, and index.md, which says where each of them comes from."""
EPILOG = """CONFIG is a run's YAML file, of which only data, steps, seed and storage are read;
key.path=value overrides it: data.sources.image.weight=0.1"""


def preview_command(words: list[str]) -> int:
    options = _parser().parse_intermixed_args(words)
    settings = read_settings(options.words)
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there and not empty; name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another") from error
    run_data = open_data(settings)
    index = [f"# First slots of `{' '.join(options.words)}`", ""]
    for source, sequences in _first_sequences(run_data, settings.steps).items():
        if not sequences:
            print(f"{source}: has no slot in {settings.steps:,} steps")
            continue
        lines = write_source(out, source, _media(run_data, source), sequences)
        index += [f"## {source}", "", *lines, ""]
        print(f"{source}: {len(sequences)} sequences, from step {sequences[0].slot.step:,} on")
    (out / "index.md").write_text("\n".join(index), "utf-8", "backslashreplace")
    print(f"written to {out}; start with {out / 'index.md'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.preview",
        description=ABOUT,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="+", metavar="CONFIG | key.path=value")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty folder")
    return parser


def _media(run_data: RunData, source: str) -> MediaConfig | None:
    return run_data.config.media(run_data.manifests[source].modality)


def _first_sequences(run_data: RunData, steps: int) -> dict[str, list[SeenSequence]]:
    """By source; fewer than SEQUENCES where the run ends before."""
    found: dict[str, list[SeenSequence]] = {name: [] for name in sorted(run_data.manifests)}
    for place in run_data.plan.walk(0, steps, rank=0, world=1):
        sequences = found[place.source]
        if len(sequences) < SEQUENCES:
            sequences += islice(_sequences(run_data, place), SEQUENCES - len(sequences))
        elif all(len(others) == SEQUENCES for others in found.values()):
            break
    return found


def _sequences(run_data: RunData, place: SlotPlan) -> Iterator[SeenSequence]:
    """The sequences of one slot, read by itself: as one rank of as many as there are slots."""
    world = run_data.config.slots_per_step
    (slot,) = read_slots(run_data, place.step, place.step + 1, place.slot, world)
    key = WindowKey(place.source, place.slot, place.epoch, place.window)
    known = run_data.task(key).row_places()
    rows = [known.get(row_id) for row_id in slot.row_ids.tolist()]
    for number, symbols in enumerate(slot.symbols):
        if slot.content is None:
            yield SeenSequence(place, number, symbols, None, rows)
        elif number < len(rows):  # the others are padding
            yield SeenSequence(place, number, symbols, slot.content[number], [rows[number]])


if __name__ == "__main__":
    end_with(preview_command)
