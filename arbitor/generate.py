"""Text from a trained model: `python -m arbitor.generate --checkpoint RUN --prompt TEXT`.

RUN is a run's folder, a checkpoint's folder or a file of `arbitor.export`.
Shape letters: B samples, M symbols, V symbols of the vocabulary.
"""

import argparse
import codecs
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arbitor.cuda_graph import Recording, can_record
from arbitor.errors import UserError
from arbitor.export import open_model
from arbitor.kernel.backend import BACKENDS, set_backend
from arbitor.main import ARBModel
from arbitor.vocab import END_OF_DOCUMENT, NUM_BYTES

PREFILL = 256  # symbols of a prompt that go through the model at once
FIRST_ROOM = 256  # positions of a fresh ledger


@dataclass(frozen=True)
class Sampling:
    """How the next symbol is drawn from its probabilities."""

    temperature: float = 0.8  # 0 = greedy: the most likely symbol
    top_p: float = 0.95  # the most likely symbols that make up this much
    seed: int = 0

    def validate(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"--temperature: expected 0 to 100, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p: expected more than 0 and at most 1, got {self.top_p}")

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
    """A model and its ledger: takes symbols, gives the logits of the next one.

    On a GPU the steps of one symbol, which fills a block of compressed positions or does not, are
    recorded and replayed until the ledger grows.
    """

    def __init__(self, model: ARBModel, batch_size: int):
        self.model, self.length = model, 0
        self.ledger = model.ledger(batch_size)
        self.ledger.reserve(FIRST_ROOM)
        self._input_B1 = torch.zeros(
            batch_size, 1, dtype=torch.int64, device=self.ledger.position.device
        )
        # By whether they pool: None of a step that has run once, and so has compiled its kernels.
        self._recordings: dict[bool, Recording | None] = {}

    @torch.no_grad()
    def feed(self, symbols_BM: Tensor) -> Tensor:
        """float32 [B, V] on the CPU: logits after the last of these symbols."""
        for chunk_BM in symbols_BM.split(PREFILL, dim=1):
            self.length += chunk_BM.shape[1]
            if self.ledger.reserve(self.length):
                self._recordings.clear()
            is_step, stride = chunk_BM.shape[1] == 1, self.ledger.stride
            self.ledger.pools = not is_step or (stride > 0 and self.length % stride == 0)
            logits_BV = self._step(chunk_BM) if is_step else self._logits(chunk_BM)
        return logits_BV.float().cpu()

    def _logits(self, symbols_BM: Tensor) -> Tensor:
        return self.model.logits(symbols_BM.to(self._input_B1.device), self.ledger)[:, -1]

    def _step(self, symbols_B1: Tensor) -> Tensor:
        self._input_B1.copy_(symbols_B1)
        pools = self.ledger.pools
        if pools not in self._recordings or not can_record(self._input_B1.device):
            self._recordings[pools] = None
            return self._logits(self._input_B1)
        recording = self._recordings[pools]
        if recording is None:
            recording = Recording(lambda: self._logits(self._input_B1))
            self._recordings[pools] = recording
        recording.replay()
        return recording.result


def generate(
    model: ARBModel, prompt: bytes, length: int, sampling: Sampling, batch_size: int = 1
) -> Iterator[list[int | None]]:
    """Yields the next symbol of each sample, at most `length` times; None after a document's end.

    The prompt begins a document. Only bytes and the document's end are drawn.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    decoder, ended_B = Decoder(model, batch_size), torch.zeros(batch_size, dtype=torch.bool)
    symbols = torch.tensor([END_OF_DOCUMENT, *prompt]).expand(batch_size, -1)
    for _ in range(length):
        symbols_B = sampling.draw(decoder.feed(symbols)[:, : NUM_BYTES + 1], generator)
        ended_B |= symbols_B == END_OF_DOCUMENT
        yield [None if e else s for s, e in zip(symbols_B.tolist(), ended_B.tolist(), strict=True)]
        if ended_B.all():
            return
        symbols = symbols_B.unsqueeze(1)


def texts(symbols: list[list[int | None]]) -> list[str]:
    """What `generate` yielded, as a text a sample."""
    samples = (bytes(s for s in sample if s is not None) for sample in zip(*symbols, strict=True))
    return [sample.decode(errors="replace") for sample in samples]


def main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    sampling.validate()
    if options.length < 1 or options.batch < 1:
        raise UserError("--length, --batch: expected at least 1")
    set_backend(options.backend)
    opened = open_model(options.checkpoint)
    model = opened.model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{opened.path}: step {opened.step}", file=sys.stderr)
    started = time.perf_counter()
    steps = generate(model, options.prompt.encode(), options.length, sampling, options.batch)
    symbols = list(stream(options.prompt, steps) if options.batch == 1 else steps)
    seconds = time.perf_counter() - started
    if options.batch > 1:
        for number, text in enumerate(texts(symbols), start=1):
            print(f"--- {number}\n{options.prompt}{text}")
    count = len(symbols) * options.batch
    print(f"{count:,} bytes, {count / seconds:,.0f} a second", file=sys.stderr)


def stream(prompt: str, steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
    """Passes on the steps of one sample and prints its text as it comes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    for step in steps:
        if step[0] is not None:
            print(decoder.decode(bytes(step)), end="", flush=True)
        yield step
    print(decoder.decode(b"", final=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="arbitor.generate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="a run's folder, or a file")
    add("--prompt", default="", help="how the text begins")
    add("--length", type=int, default=400, help="bytes at most (%(default)s)")
    temperature = "0 takes the most likely symbol (%(default)s)"
    add("--temperature", type=float, default=Sampling.temperature, help=temperature)
    add("--top-p", type=float, default=Sampling.top_p, help="of the likely ones (%(default)s)")
    add("--seed", type=int, default=Sampling.seed, help="of the draws (%(default)s)")
    add("--batch", type=int, default=1, help="samples of the prompt (%(default)s)")
    add("--backend", default="auto", choices=BACKENDS)
    return parser


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
