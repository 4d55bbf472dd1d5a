"""The content fault: bytes of a row that were read whole and yet hold nothing to train on."""

from collections.abc import Iterator
from contextlib import contextmanager


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
