"""The page of a run and the server that shows it, from journals written here."""

import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser

import pytest
from PIL import Image

from arbitor.errors import UserError
from arbitor.settings import build, write_yaml
from ray_jobs.chart import COLORS, MOST_POINTS, thin, ticks
from ray_jobs.config import CONFIG, RunConfig
from ray_jobs.dashboard import make_server
from ray_jobs.goodput import account
from ray_jobs.journal import JOURNAL, Note, Record, Start
from ray_jobs.report import main, write_report

SOURCES = ("audio", "code", "image", "text", "video")


def record(step, time, seconds, wait=0.0, **metrics):
    shares = {f"mix/{kind}/{name}": 0.2 for kind in ("realised", "target") for name in SOURCES}
    losses = {f"loss/{name}": 5.0 - 0.1 * step + i for i, name in enumerate(SOURCES)}
    throughput = {
        "throughput/step_s": seconds,
        "throughput/positions_per_s": 100 / seconds,
        "throughput/data_wait_pct": 100 * wait / seconds,
    }
    flips = {"ternary/flip_rate": 0.01, "loss/total": 7.0 - 0.1 * step}
    return Record(step, time, losses | throughput | shares | flips | metrics)


def write_run(storage, name, lines):
    """A run's folder with these lines in its journal."""
    sources = {name: {"modality": name, "path": f"sample://{name}"} for name in SOURCES}
    values = {"name": name, "storage": str(storage), "steps": 40, "data": {"sources": sources}}
    config = build(RunConfig, values)
    config.folder.mkdir(parents=True)
    (config.folder / CONFIG).write_text(write_yaml(config.values()))
    journal = "".join(json.dumps(vars(line)) + "\n" for line in lines)
    (config.folder / JOURNAL).write_text(journal)
    return config


LIFE = [
    Start(100.0, 0, "driver", 1, "here"),
    Start(104.0, 0, "worker", 2, "here"),
    record(1, 107.0, 2.0, wait=0.5),  # 4 s of the driver's start and 1 s of the worker's
    record(2, 111.0, 2.0, **{"throughput/validation_s": 1.5}),  # 0.5 s of something else
    record(3, 113.5, 2.0, **{"checkpoint/blocked_s": 0.5}),
    Start(120.0, 2, "worker", 3, "here"),  # killed after step 3, step 3 is run again
    record(4, 125.5, 2.0),  # 10 s of restart, of which 2 s are the replayed step
    Note(126.0, "checkpoint of step 4 is durable"),  # the driver's last word
    Start(1000.0, 4, "driver", 4, "here"),
    Start(1003.0, 4, "worker", 5, "here"),
    record(5, 1006.0, 2.0),  # 4 s of restart
]


def test_every_second_of_a_run_is_accounted_for():
    goodput = account(LIFE)
    assert goodput.seconds == {
        "compute": pytest.approx(9.5),
        "data wait": pytest.approx(0.5),
        "validation": pytest.approx(1.5),
        "checkpoint": pytest.approx(0.5),
        "start": pytest.approx(5.0),
        "restart": pytest.approx(14.0),
        "other": pytest.approx(1.0),
    }
    assert goodput.up == pytest.approx((126 - 100) + (1006 - 1000))
    assert goodput.share == pytest.approx(9.5 / 32)
    assert goodput.restarts == 2


def test_an_unbroken_run_is_as_good_as_its_steps():
    lines = [record(step, 10.0 * step, 10.0) for step in range(1, 6)]
    goodput = account(lines)
    assert goodput.share == 1.0 and goodput.restarts == 0 and goodput.up == pytest.approx(40)
    assert account([]).share == 0.0


def test_ticks_are_round_and_inside():
    assert ticks(0.03, 1.02) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(5, 5) == [5]
    assert ticks(0, 20000) == [0, 5000, 10000, 15000, 20000]


def test_long_lines_are_thinned_to_their_means_and_keep_their_end():
    points = [(step, float(step % 2)) for step in range(1, 10_001)]
    drawn = thin(points)
    assert len(drawn) <= MOST_POINTS and drawn[-1][0] == 10_000
    assert all(0.4 < y < 0.6 for _, y in drawn)
    assert thin([(1, 2.0), (2, float("nan")), (3, float("inf"))]) == [(1, 2.0)]


class Figures(HTMLParser):
    """The lines and dots of each figure, by its heading; what the page would fetch."""

    def __init__(self, page):
        super().__init__()
        self.figures, self.fetched, self._in_heading, self._heading = {}, [], False, ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._in_heading = tag == "h3"
        if attributes.get("class") == "series":
            points = attributes.get("points", "dot").split()
            self.figures.setdefault(self._heading, {})[attributes["data-name"]] = points
        self.fetched += [v for k, v in attributes.items() if k in ("src", "href")]

    def handle_data(self, text):
        if self._in_heading:
            self._heading, self._in_heading = text, False


def test_the_page_has_every_source_and_needs_no_network(tmp_path, capsys):
    config = write_run(tmp_path, "a<run>", LIFE)
    main([str(config.folder)])
    assert capsys.readouterr().out.strip() == str(config.folder / "report.html")
    page = (config.folder / "report.html").read_text()
    read = Figures(page)
    assert read.fetched == [] and "<script" not in page and "a&lt;run&gt;" in page
    losses = read.figures["loss, by source"]
    assert losses.keys() == {*SOURCES, "total"}
    for points in losses.values():
        heights = [float(point.split(",")[1]) for point in points]
        assert len(heights) == 5 and heights == sorted(heights)  # the losses fall
    assert {"mix", "trits", "positions per second", "data wait"} <= read.figures.keys()
    assert "model FLOP utilisation" not in read.figures  # there was no known device
    assert "9.5 s / 32.0 s = 29.7 %" in page
    assert "checkpoint of step 4 is durable" in page


def test_a_run_without_a_step_has_a_page(tmp_path):
    assert "no step is done yet" in write_report(write_run(tmp_path, "empty", [])).read_text()
    with pytest.raises(UserError, match="give a run's folder"):
        main([str(tmp_path)])


@pytest.fixture
def served(tmp_path):
    """The address of a dashboard over two runs, the second of which moved last."""
    write_run(tmp_path, "earlier", LIFE[:3])
    write_run(tmp_path, "later", LIFE)
    with make_server(tmp_path, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def look(address):
    with urllib.request.urlopen(address, timeout=10) as answer:
        return answer.read().decode()


def test_the_dashboard_shows_the_run_as_it_is_now(served, tmp_path):
    page = look(served)
    assert "<title>later</title>" in page and 'http-equiv="refresh"' in page
    assert len(Figures(page).figures["loss, by source"]["text"]) == 5
    with open(tmp_path / "later" / JOURNAL, "a") as file:
        file.write(json.dumps(vars(record(6, 1010.0, 2.0))) + "\n")
    assert len(Figures(look(served)).figures["loss, by source"]["text"]) == 6
    assert "<title>earlier</title>" in look(f"{served}earlier")
    for address in ("none", "../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            look(served + address)


def test_a_busy_port_is_told(served, tmp_path):
    port = int(re.search(r":(\d+)/", served)[1])
    with pytest.raises(UserError, match=f"--port {port}: something serves on it already"):
        make_server(tmp_path, port)
    with pytest.raises(UserError, match="no run there"):
        make_server(tmp_path / "nowhere", 0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser: chromium")
def test_a_browser_draws_the_losses(served, tmp_path):
    """Without a click: the colours of all five sources are to be seen in the window."""
    picture = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--window-size=1280,900", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*command, f"--screenshot={picture}", served], check=True, timeout=120)
    pixels = Image.open(picture).convert("RGB").getcolors(1 << 24)
    seen = {color: count for count, color in pixels}
    for color in COLORS[: len(SOURCES)]:
        rgb = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
        assert seen.get(rgb, 0) > 150, f"{color} is not drawn"
