"""A run on one page: `python -m ray_jobs.report RUN` writes RUN/report.html.

Reads the run's configuration and journal, so it can be made at any time, of a run that is still
training too. The page is one file that needs no network; a run writes it at its end.
"""

import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from arbitor.errors import UserError
from arbitor.modality import MODALITIES
from ray_jobs.chart import Point, line_chart, share_bar
from ray_jobs.config import RunConfig, read_run_config
from ray_jobs.goodput import Goodput, account
from ray_jobs.journal import JournalReader, Line, Note, Record, Start
from ray_jobs.processes import replace_text

REPORT = "report.html"  # in the run's folder
_EVENTS_SHOWN = 200  # the last ones

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #888; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1220px; margin: 2em auto; padding: 0 1em; }
h1 { margin: 0; } h3 { margin: 0; font-size: 1em; } p { margin: .2em 0 .6em; color: var(--quiet); }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .15em 1.2em .15em 0; text-align: left; font-weight: normal; }
td { font-variant-numeric: tabular-nums; } th { color: var(--quiet); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1.5em; }
figure { margin: 0; } svg { width: 100%; height: auto; } svg.bar { height: 1.6em; }
svg text { font-size: 11px; fill: var(--quiet); } svg .grid { stroke: var(--line); }
.legend { list-style: none; padding: 0; margin: .2em 0; display: flex; flex-wrap: wrap; gap: 1em; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
"""


def main(words: Sequence[str]) -> None:
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError("expected one RUN: python -m ray_jobs.report RUN, a run's folder")
    config = read_run_config(Path(words[0]))
    print(write_report(config))


def write_report(config: RunConfig) -> Path:
    """Writes the page of a run into its folder."""
    path = config.folder / REPORT
    replace_text(path, report_page(config))
    return path


def closing_figures(config: RunConfig) -> list[str]:
    """The realised mix beside the asked one, and the goodput, for the end of a run."""
    lines = list(JournalReader(config.folder).read_lines())
    last = [line for line in lines if isinstance(line, Record)][-1].metrics
    mix = ", ".join(
        f"{source} {100 * last[f'mix/realised/{source}']:.2f} %"
        f" (asked {100 * last[f'mix/target/{source}']:.2f})"
        for source in config.data.active_sources
    )
    goodput = account(lines)
    return [
        f"mix: {mix}",
        f"goodput: {100 * goodput.share:.1f} % of {duration(goodput.up)},"
        f" {goodput.restarts} restarts",
    ]


def report_page(config: RunConfig, refresh_seconds: int = 0) -> str:
    """The page, as HTML; one that is served asks for itself again and again."""
    lines = list(JournalReader(config.folder).read_lines())
    records = [line for line in lines if isinstance(line, Record)]
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    head = f'<meta charset="utf-8">{refresh}<title>{escape(config.name)}</title>'
    body = [f"<h1>{escape(config.name)}</h1>", f"<p>{escape(str(config.folder))}</p>"]
    if not records:
        body.append("<p>no step is done yet</p>")
    else:
        goodput = account(lines)
        body += [_summary(config, records, goodput), _charts(config, records), _time(goodput)]
    body.append(_events(lines))
    style = f"<style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}{style}</head>\n<body>' + "\n".join(
        [*body, "</body></html>\n"]
    )


def _summary(config: RunConfig, records: Sequence[Record], goodput: Goodput) -> str:
    first, last = records[0].metrics, records[-1].metrics
    positions = config.data.slots_per_step * config.data.batch_size * config.data.sequence_length
    rows = {
        "steps": f"{records[-1].step:,} of {config.steps:,}",
        "loss": f"{first['loss/total']:.4f} -> {last['loss/total']:.4f}",
        "positions": f"{positions * len(records):,}",
        "last step": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(records[-1].time)),
        "up": duration(goodput.up),
        "goodput": f"{100 * goodput.share:.1f} %",
        "restarts": str(goodput.restarts),
    }
    for record in reversed(records):  # the newest evaluation
        found = {k: v for k, v in record.metrics.items() if k.startswith("bits_per_byte/")}
        if found:
            rows |= {
                f"bits per byte, {key.removeprefix('bits_per_byte/')}": f"{value:.4f}"
                for key, value in found.items()
            }
            break
    cells = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _charts(config: RunConfig, records: Sequence[Record]) -> str:
    def of(*names: str) -> dict[str, list[Point]]:
        return {name.rpartition("/")[2]: series[name] for name in names if name in series}

    def under(prefix: str) -> dict[str, list[Point]]:
        return {k.removeprefix(prefix): v for k, v in series.items() if k.startswith(prefix)}

    series: dict[str, list[Point]] = {}
    for record in records:
        for name, value in record.metrics.items():
            series.setdefault(name, []).append((record.step, value))
    utilisation = {name: [(x, 100 * y) for x, y in v] for name, v in of("throughput/mfu").items()}
    names = [*config.data.active_sources, "total"]
    charts = [
        line_chart(
            "loss, by source", under("loss/"), "nats per byte or code; velocity error", names=names
        ),
        line_chart("loss, by modality", under("loss_by_modality/"), names=MODALITIES),
        line_chart("validation, by source", under("validation/"), "held-out rows", names=names),
        line_chart(
            "bits per byte, by source", under("bits_per_byte/"), "held-out rows", names=names
        ),
        line_chart(
            "mix",
            under("mix/realised/"),
            "share of slots; dashed: asked",
            under("mix/target/"),
            names,
        ),
        line_chart("trits", of("ternary/flip_rate"), "share of the weights that change in a step"),
        line_chart("zeros", of("ternary/zero_fraction"), "share of the weights that are 0"),
        line_chart("positions per second", of("throughput/positions_per_s")),
        line_chart("model FLOP utilisation", utilisation, "percent of the bfloat16 peak"),
        line_chart("data wait", of("throughput/data_wait_pct"), "percent of a step's time"),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _time(goodput: Goodput) -> str:
    shares = {name: value for name, value in goodput.seconds.items() if value > 0}
    rows = (
        f"<tr><th>{escape(name)}</th><td>{duration(value)}</td></tr>"
        for name, value in shares.items()
    )
    formula = (
        "goodput = time in which steps that count were computed / time that the run was up ="
        f" {duration(goodput.seconds['compute'])} / {duration(goodput.up)} ="
        f" {100 * goodput.share:.1f} %. A step that was lost and run again counts once; what a"
        " restart takes includes the steps that it repeats."
    )
    return (
        f"<h3>where the time went</h3><p>{formula}</p>{share_bar(shares)}"
        f"<table>{''.join(rows)}</table>"
    )


def _events(lines: Sequence[Line]) -> str:
    events = [line for line in lines if not isinstance(line, Record)][-_EVENTS_SHOWN:]
    rows = (
        f"<tr><th>{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event.time))}</th>"
        f"<td>{escape(_in_words(event))}</td></tr>"
        for event in events
    )
    return f"<h3>events</h3><table>{''.join(rows)}</table>"


def _in_words(event: Note | Start) -> str:
    if isinstance(event, Note):
        return event.note
    return f"{event.process} starts after step {event.after_step}: {event.host}, pid {event.pid}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


if __name__ == "__main__":
    from ray_jobs.run import exit_with_message

    exit_with_message(lambda: main(sys.argv[1:]))
