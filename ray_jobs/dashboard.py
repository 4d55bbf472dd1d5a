"""Charts of runs in a browser: `python -m ray_jobs.dashboard [RUN | STORAGE] [--port PORT]`.

Serves the page of `ray_jobs.report`, made anew at every look, of a run that is training as of one
that has ended; of a storage folder the run that moved last, with links to the others. On this
machine alone (127.0.0.1): from elsewhere through `ssh -L` or `kubectl port-forward`.
"""

import argparse
import errno
import sys
import time
from functools import partial
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

from arbitor.errors import UserError
from ray_jobs.config import CONFIG, RunConfig, read_run_config
from ray_jobs.journal import JOURNAL
from ray_jobs.report import report_page
from ray_jobs.run import exit_with_message

HOST = "127.0.0.1"
PORT = 8266  # beside Ray's dashboard
REFRESH_SECONDS = 5


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dashboard", description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", default=RunConfig.storage, metavar="RUN | STORAGE")
    parser.add_argument("--port", type=int, default=PORT)
    options = parser.parse_args(words)
    with make_server(Path(options.path), options.port) as server:
        print(f"http://{HOST}:{server.server_port}/ shows {options.path}; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def make_server(path: Path, port: int) -> ThreadingHTTPServer:
    """A server of the run or storage folder `path`; port 0 is any free one."""
    if not runs_of(path):
        raise UserError(f"{path}: no run there; give a run's folder or the folder of runs")
    try:
        return ThreadingHTTPServer((HOST, port), partial(Handler, path))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise UserError(
            f"--port {port}: something serves on it already; give another one, as --port {port + 1}"
        ) from error


def runs_of(path: Path) -> list[Path]:
    """The run `path`, or the runs in it, the one whose journal moved last first."""
    if (path / CONFIG).is_file():
        return [path]
    runs = [config.parent for config in path.glob(f"*/{CONFIG}")]
    return sorted(runs, key=_last_change, reverse=True)


def _last_change(run: Path) -> float:
    journal = run / JOURNAL
    return (journal if journal.exists() else run / CONFIG).stat().st_mtime


class Handler(BaseHTTPRequestHandler):
    """`/` is the newest run, `/NAME` the run of that name."""

    def __init__(self, path: Path, *arguments: object):
        self._folder = path
        super().__init__(*arguments)

    def do_GET(self) -> None:
        runs = {run.absolute().name: run for run in runs_of(self._folder)}
        name = unquote(self.path.partition("?")[0].strip("/")) or next(iter(runs), "")
        if name not in runs:
            self.send_error(404, f"no run {name}")
            return
        page = report_page(read_run_config(runs[name]), REFRESH_SECONDS)
        links = " ".join(f'<a href="/{quote(run)}">{escape(run)}</a>' for run in runs)
        navigation = f"<nav>{links}</nav><p>as of {time.strftime('%H:%M:%S')}</p>"
        content = page.replace("<body>", f"<body>{navigation}", 1).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Nobody wants to read of each look."""


if __name__ == "__main__":
    exit_with_message(lambda: main(sys.argv[1:]))
