"""The one exception for mistakes that the user can mend, and how a command ends."""

import os
import sys
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: a config key, a file, a command line.

    The message is one line that names the culprit, what was expected and what to do. Entry points
    print it without a stack trace and exit with code 2.
    """


def end_with(command: Callable[[list[str]], Any], *mistakes: type[Exception]) -> None:
    """Runs a command on the command line's words; an int that it returns is the exit code.

    A UserError, or one of `mistakes`, ends with one line and exit code 2.
    """
    try:
        code = command(sys.argv[1:]) or 0
        sys.stdout.flush()
    except (UserError, *mistakes) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    if code:
        sys.exit(code)
