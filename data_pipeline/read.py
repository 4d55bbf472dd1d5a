"""Reading indexed rows again, and only as they were indexed.

A fault of the disk or the network is retried and then stops the run, and so does a shard that
changed: neither may ever change the data.
"""

import time
from collections.abc import Mapping, Sequence

from arbitor.errors import UserError
from data_pipeline.decode.text import Group, open_shard
from data_pipeline.manifest import Segment
from data_pipeline.row_id import digest_of, join_digests, row_ids

RETRY_AFTER_S = (0.2, 1.0, 3.0)


class ShardError(RuntimeError):
    """A shard that was indexed cannot be read, or reads differently now."""


def read_segments(
    shards: Mapping[int, str], text_column: str, segments: Sequence[Segment]
) -> tuple[list[bytes], str]:
    """The rows of `segments` in order and the digest of what was read (`join_digests`).

    Raises ShardError naming the file whose rows are not those that were indexed.
    """
    rows: list[bytes] = []
    digests: list[str] = []
    held, group_rows = None, []
    for segment in segments:
        path = shards[segment.shard]
        place = (segment.shard, segment.location)
        if held != place:
            held, group_rows = place, _read_group(path, text_column, segment)
        part = group_rows[segment.row_start : segment.row_stop]
        digests.append(digest_of(row_ids(part)))
        if digests[-1] != segment.digest:
            raise ShardError(f"{path}: changed since it was indexed; restore it or start a new run")
        rows += part
    return rows, join_digests(digests)


def _read_group(path: str, text_column: str, segment: Segment) -> list[bytes]:
    group = Group(segment.location, segment.length)
    for pause in (*RETRY_AFTER_S, None):
        try:
            return open_shard(path, text_column).read(group)
        except UserError as error:
            message = f"{error}; it was readable when indexed: restore it or start a new run"
            raise ShardError(message) from error
        except OSError as error:
            if pause is None:
                message = f"{path}: cannot be read ({error}), tried {len(RETRY_AFTER_S) + 1} times"
                raise ShardError(message) from error
            time.sleep(pause)
    raise AssertionError("unreachable")
