"""What the decoders share: the content fault (bytes of a row that were read whole and yet hold
nothing to train on), and the check that a row fits its sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from arbitor.errors import UserError


class ContentError(Exception):
    """Content that cannot be decoded; the message is the reason, short enough for a list."""


@contextmanager
def content_errors(*kinds: type[Exception]) -> Iterator[None]:
    """A decoder library's own errors, `kinds`, become ContentError; any other error stays."""
    try:
        yield
    except kinds as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None)
        reason = reason or str(error) or type(error).__name__
        raise ContentError(reason.splitlines()[0].rstrip(".")[:200]) from error


def validate_length(section: str, length: int, positions: int, what: str, sizes: str) -> None:
    """Raises UserError unless a sequence of `length` holds the content and its two borders."""
    if length < positions + 2:
        raise UserError(
            f"{section}.sequence_length: {positions} {what} and 2 specials do not fit {length};"
            f" set it to {positions + 2} or more, or {sizes} lower"
        )
