"""How a command ends: its exit code and what it prints."""

import subprocess
import sys
from functools import partial

import pytest

from arbitor.errors import UserError, end_with


def fail_with(error, words):
    raise error


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (lambda words: 3, 3, ""),
        (partial(fail_with, UserError("no such file")), 2, "error: no such file\n"),
        (partial(fail_with, LookupError("a bad shard")), 2, "error: a bad shard\n"),
        (partial(fail_with, KeyboardInterrupt()), 130, ""),
    ],
)
def test_the_code_and_the_line_of_an_ending(command, code, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "some", "words"])
    with pytest.raises(SystemExit) as ended:
        end_with(command, LookupError)
    assert ended.value.code == code and capsys.readouterr().err == message


def test_what_ends_well_returns(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "some", "words"])
    assert end_with(lambda words: print(*words)) is None
    assert capsys.readouterr().out == "some words\n"


def test_a_reader_that_goes_away_is_no_error():
    program = "from arbitor.errors import end_with; end_with(lambda _: print('x' * 999999))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as command:
        command.stdout.read(1)
        command.stdout.close()
        assert command.stderr.read() == "" and command.wait() == 141
