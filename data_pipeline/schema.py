"""What the user says of the data: the `data` section of a run's config."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from arbitor.errors import UserError
from arbitor.modality import BYTE_MODALITIES, MODALITIES
from data_pipeline.decode.audio import AudioConfig
from data_pipeline.decode.image import ImageConfig
from data_pipeline.decode.video import VideoConfig
from data_pipeline.format.shard import Columns
from data_pipeline.layout import MediaConfig
from data_pipeline.mixture import weight_at, weight_points

LAST_BREAKPOINT = 10_000_000  # a schedule is worked out step by step up to its last point


@dataclass(frozen=True)
class SourceConfig:
    """One weighted source: a set of shards of one modality.

    `path` is a file, a folder (recursively) or a glob, on this machine or at a URI that pyarrow
    knows (file://, s3://, gs://); `sample://text` and the like are small shards made on this
    machine. Parquet, JSONL and WebDataset tar rows are read by column (or key); where there are
    none of these, files of text or code are plain text (`index.choose_shards`).

    `weight` is the source's share of the slots, relative to the other sources: a constant, or
    [[step, weight], ...], linear between the points and constant after the last.
    """

    modality: str = "text"
    path: str = ""
    weight: float | list[list[float]] = 1.0
    text_column: str = "text"  # the text, caption or transcript
    content_column: str = ""  # encoded image, sound or video; empty: named as the modality
    max_epochs: int = 0  # 0 = as many as the run takes
    when_exhausted: str = "drop"  # the source, after max_epochs; or "stop" the run

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.content_column or self.modality)

    @property
    def is_active(self) -> bool:
        """False where the weight is 0 at every step: then the path is not even opened."""
        return any(weight > 0 for _, weight in weight_points(self.weight))


@dataclass(frozen=True)
class DataConfig:
    """The mixture and the shape of a step: `slots_per_step` micro-batches of B x T targets.

    A slot of images, sound or video has as many positions, in sequences of their own length.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    batch_size: int = 4  # sequences in a slot (B)
    sequence_length: int = 256  # positions in a sequence (T)
    slots_per_step: int = 4
    eval_fraction: float = 0.02  # of each source's rows, the last ones; never trained on
    eval_slots: int = 64  # held-out slots per source at most
    # Of a source's pictures, sounds or films; with more undecodable ones the run stops. Of text and
    # code the index refuses the first shard with a row that cannot be read.
    max_bad_fraction: float = 0.01
    # Processes that read and decode for one worker, one more than the cores that they are to fill:
    # Ray Data takes up to 0.1 s to see that a task has ended. Ray counts no CPUs for them, because
    # trainers may hold all of those: leave cores over for them.
    decode_tasks: int = 3
    image: ImageConfig = field(default_factory=ImageConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    video: VideoConfig = field(default_factory=VideoConfig)

    @property
    def active_sources(self) -> dict[str, SourceConfig]:
        """The sources with a weight above 0 at some step, by name in sorted order."""
        return {name: self.sources[name] for name in sorted(self.sources) if self.is_active(name)}

    def is_active(self, name: str) -> bool:
        return self.sources[name].is_active

    def media(self, modality: str) -> MediaConfig | None:
        """How a modality's rows are decoded; None where they are bytes."""
        return None if modality in BYTE_MODALITIES else getattr(self, modality)

    def sequence_length_of(self, modality: str) -> int:
        media = self.media(modality)
        return media.sequence_length if media else self.sequence_length

    def batch_size_of(self, modality: str) -> int:
        """Sequences in a slot: all slots have batch_size x sequence_length positions."""
        return self.batch_size * self.sequence_length // self.sequence_length_of(modality)

    def validate(self) -> None:
        """Raises UserError, naming the key, on the first value that no run could use."""
        for key in (
            "batch_size",
            "sequence_length",
            "slots_per_step",
            "eval_slots",
            "decode_tasks",
        ):
            if getattr(self, key) < 1:
                raise UserError(f"data.{key}: must be at least 1, not {getattr(self, key)}")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(
                f"data.eval_fraction: must be from 0 (no hold-out) to below 1, "
                f"not {self.eval_fraction}"
            )
        if not 0 <= self.max_bad_fraction < 1:
            raise UserError(
                f"data.max_bad_fraction: must be from 0 to below 1, not {self.max_bad_fraction}"
            )
        for name, source in self.sources.items():
            _validate_source(f"data.sources.{name}", name, source)
            if source.is_active and source.modality not in BYTE_MODALITIES:
                self._validate_positions(source.modality)
        _validate_mixture(self.active_sources)

    def _validate_positions(self, modality: str) -> None:
        length, positions = (
            self.sequence_length_of(modality),
            self.batch_size * self.sequence_length,
        )
        if positions % length:
            raise UserError(
                f"data.{modality}.sequence_length: {length} does not divide the {positions}"
                f" positions of a slot (data.batch_size x data.sequence_length); make it a divisor"
            )


def _validate_source(key: str, name: str, source: SourceConfig) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"{key}: a source's name has letters, digits, _ and - only")
    _validate_weight(f"{key}.weight", source.weight)
    if source.modality not in MODALITIES:
        raise UserError(
            f"{key}.modality: unknown modality {source.modality!r}; use one of "
            f"{', '.join(MODALITIES)}"
        )
    if not source.is_active:
        return
    if not source.path:
        raise UserError(f"{key}.path: missing; give a file, a folder, a glob or sample://text")
    if source.max_epochs < 0:
        raise UserError(f"{key}.max_epochs: must be at least 1, or 0 for no limit")
    if source.when_exhausted not in ("drop", "stop"):
        raise UserError(
            f"{key}.when_exhausted: expected drop (go on without the source) or stop (end the run),"
            f" not {source.when_exhausted!r}"
        )


def _validate_weight(key: str, weight: float | list[list[float]]) -> None:
    points = [[0, weight]] if isinstance(weight, int | float) else weight
    if not points or any(len(point) != 2 for point in points):
        raise UserError(f"{key}: expected a number or [[step, weight], ...], not {weight}")
    for step, value in points:
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{key}: a weight must be finite and at least 0, not {value}")
        if not (0 <= step <= LAST_BREAKPOINT and step == int(step)):
            raise UserError(
                f"{key}: a step must be a whole number from 0 to {LAST_BREAKPOINT}, not {step}"
            )
    steps = [step for step, _ in points]
    if any(left >= right for left, right in zip(steps, steps[1:], strict=False)):
        raise UserError(f"{key}: the steps must increase, got {steps}")


def _validate_mixture(sources: Mapping[str, SourceConfig]) -> None:
    """Weights are linear between the points, so a step without any has one among the points."""
    if not sources:
        raise UserError("data.sources: at least one source needs a weight above 0")
    schedules = [weight_points(source.weight) for source in sources.values()]
    for step in sorted({0, *(step for points in schedules for step, _ in points)}):
        if not any(weight_at(points, step) for points in schedules):
            raise UserError(f"data.sources: at step {step} all weights are zero; raise one of them")
