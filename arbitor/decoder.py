"""A model and its ledger: takes symbols and content one after another; how the next one is drawn.

Shape letters: B samples, M further positions, T positions so far, D width, V symbols, X bytes of a
place.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.audio_codec import FRAMES_PER_SECOND
from arbitor.cuda_graph import Recording, can_record
from arbitor.errors import UserError
from arbitor.head.video import NUM_TIMES
from arbitor.kernel.latent_update.fixed_point import SEEDS
from arbitor.main import ARBModel
from arbitor.vocab import CONTENT_SYMBOLS, END_OF_DOCUMENT, NUM_BYTES

PREFILL = 256  # positions that go through the model at once
FIRST_ROOM = 256  # positions of a fresh ledger


@dataclass(frozen=True)
class Sampling:
    """How symbols, codes and heads are drawn from their probabilities, and patches from noise."""

    temperature: float = 0.8  # 0 = greedy: the most likely symbol
    top_p: float = 0.95  # the most likely symbols that make up this much
    seed: int = 0
    steps: int = 32  # of Euler, from noise to a frame
    guidance: float = 1.0  # towards a picture's or film's caption; 1 = as learned
    seconds: float = 4.0  # of sound at most

    def validate(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"--temperature: expected 0 to 100, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p: expected more than 0 and at most 1, got {self.top_p}")
        if self.steps < 1 or NUM_TIMES % self.steps:
            raise UserError(f"--steps: expected a divisor of {NUM_TIMES}, got {self.steps}")
        if not 0 <= self.guidance <= 100:
            raise UserError(f"--guidance: expected 0 to 100, got {self.guidance}")
        if self.seed not in SEEDS:
            raise UserError(f"--seed: expected 0 to 2^32 - 1, got {self.seed}")
        if not 1 / FRAMES_PER_SECOND <= self.seconds <= 3600:
            raise UserError(f"--seconds: expected 0.02 to 3600, got {self.seconds}")

    def generator(self) -> torch.Generator:
        """The chance of one generation, on the CPU."""
        return torch.Generator().manual_seed(self.seed)

    def draw(self, logits_BV: Tensor, generator: torch.Generator) -> Tensor:
        """int64 [B] from float32 logits on the CPU."""
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        probability_BV = (logits_BV / self.temperature).softmax(dim=-1)
        sorted_BV, symbol_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        kept_BV = sorted_BV.where(before_BV < self.top_p, 0)
        place_B1 = torch.multinomial(kept_BV, 1, generator=generator)
        return symbol_BV.gather(1, place_B1).squeeze(1)


class Decoder:
    """Samples of equal length that grow together.

    On a GPU the steps of one symbol, which fills a block of compressed positions or does not, are
    recorded and replayed until the ledger grows.
    """

    def __init__(self, model: ARBModel, batch_size: int):
        self.model, self.batch_size, self.length = model, batch_size, 0
        self.ledger = model.ledger(batch_size)
        self.ledger.reserve(FIRST_ROOM)
        self.device = self.ledger.position.device
        self._input_B1 = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.device)
        # By whether they pool: None of a step that has run once, and so has compiled its kernels.
        self._recordings: dict[bool, Recording | None] = {}
        self._states: list[Tensor] = []  # [B, M, D] each; the last one alone where that is enough

    @property
    def last_BD(self) -> Tensor:
        """What the heads read of the last position."""
        return self._states[-1][:, -1]

    @property
    def states_BTD(self) -> Tensor:
        """What the video head reads of all positions."""
        return torch.cat(self._states, dim=1)

    @torch.no_grad()
    def feed(self, symbols_BM: Tensor) -> Tensor:
        """float32 [B, V] on the CPU: logits after the last of these symbols."""
        for chunk_BM in symbols_BM.split(PREFILL, dim=1):
            is_step = chunk_BM.shape[1] == 1
            self._grow(chunk_BM.shape[1], may_record=is_step)
            run = self._step if is_step else self._run
            hidden_BMD, logits_BV = run(chunk_BM)
            self._keep(hidden_BMD)
        return logits_BV.float().cpu()

    @torch.no_grad()
    def feed_content(self, modality: str, content_BMX: Tensor, first: int) -> None:
        """Places of content, uint8, the first of them with the number `first` of its kind."""
        number_M = torch.arange(first, first + content_BMX.shape[1], device=self.device)
        number_BM = number_M.expand(self.batch_size, -1)
        encoded_BMD = self.model.encode(modality, content_BMX.to(self.device), number_BM)
        for chunk_BMD in encoded_BMD.split(PREFILL, dim=1):
            self._grow(chunk_BMD.shape[1], may_record=False)
            symbols_BM = number_BM.new_full(chunk_BMD.shape[:2], CONTENT_SYMBOLS[modality][1])
            self._keep(self.model.hidden_after(symbols_BM, self.ledger, chunk_BMD))

    def _grow(self, count: int, may_record: bool) -> None:
        self.length += count
        if self.ledger.reserve(self.length):
            self._recordings.clear()
        stride = self.ledger.stride
        self.ledger.pools = not may_record or (stride > 0 and self.length % stride == 0)

    def _keep(self, hidden_BMD: Tensor) -> None:
        if self.model.video_head is None:
            self._states.clear()
        self._states.append(hidden_BMD)

    def _run(self, symbols_BM: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BMD = self.model.hidden_after(symbols_BM.to(self.device), self.ledger)
        return hidden_BMD, self.model.byte_head(hidden_BMD)[:, -1]

    def _step(self, symbols_B1: Tensor) -> tuple[Tensor, Tensor]:
        self._input_B1.copy_(symbols_B1)
        pools = self.ledger.pools
        if pools not in self._recordings or not can_record(self.device):
            self._recordings[pools] = None
            return self._run(self._input_B1)
        recording = self._recordings[pools]
        if recording is None:
            recording = Recording(lambda: self._run(self._input_B1))
            self._recordings[pools] = recording
        recording.replay()
        hidden_B1D, logits_BV = recording.result  # the next replay overwrites them
        return hidden_B1D.clone(), logits_BV


def continue_text(
    decoder: Decoder,
    symbols_BM: Tensor,
    length: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[list[int | None]]:
    """Feeds the symbols, then yields the next symbol of each sample, at most `length` times; None
    after a document's end. Only bytes and the document's end are drawn."""
    ended_B = torch.zeros(decoder.batch_size, dtype=torch.bool)
    for _ in range(length):
        symbols_B = sampling.draw(decoder.feed(symbols_BM)[:, : NUM_BYTES + 1], generator)
        ended_B |= symbols_B == END_OF_DOCUMENT
        yield [None if e else s for s, e in zip(symbols_B.tolist(), ended_B.tolist(), strict=True)]
        if ended_B.all():
            return
        symbols_BM = symbols_B.unsqueeze(1)


def texts(symbols: list[list[int | None]]) -> list[str]:
    """What `continue_text` yielded, as a text a sample."""
    samples = (bytes(s for s in sample if s is not None) for sample in zip(*symbols, strict=True))
    return [sample.decode(errors="replace") for sample in samples]
