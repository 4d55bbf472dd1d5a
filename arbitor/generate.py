"""Text, pictures, sound and film from a trained model: `python -m arbitor.generate`.

    --checkpoint RUN --prompt TEXT                                goes on with a text
    --checkpoint RUN --modality image [--caption TEXT] --out DIR  PNG; audio: WAV; video: MP4
    --checkpoint RUN --image FILE                                 a caption of a picture
    --checkpoint RUN --prompt TEXT --out DIR                      text and whatever else comes next

RUN is a run's folder, a checkpoint's folder or a file of `arbitor.export`.
"""

import argparse
import codecs
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from arbitor.content import Piece, continue_freely, describe, generate_content
from arbitor.decoder import Decoder, Sampling, continue_text, texts
from arbitor.errors import UserError, end_with
from arbitor.export import open_model
from arbitor.kernel.backend import BACKENDS, set_backend
from arbitor.main import ARBModel
from arbitor.media.files import mp4, png, wav
from arbitor.media.patches import frames_of, from_patches, to_patches
from arbitor.media.picture import PICTURE_ERRORS, decode_picture
from arbitor.vocab import CONTENT_SYMBOLS, END_OF_DOCUMENT

ENDINGS = {"text": "txt", "image": "png", "audio": "wav", "video": "mp4"}


def generate(
    model: ARBModel, prompt: bytes, length: int, sampling: Sampling, batch_size: int = 1
) -> Iterator[list[int | None]]:
    """Yields the next symbol of each sample, at most `length` times; None after a document's end.

    The prompt begins a document. Only bytes and the document's end are drawn.
    """
    symbols_BM = torch.tensor([END_OF_DOCUMENT, *prompt]).expand(batch_size, -1)
    decoder = Decoder(model, batch_size)
    return continue_text(decoder, symbols_BM, length, sampling, sampling.generator())


def main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    sampling = Sampling(
        options.temperature,
        options.top_p,
        options.seed,
        options.steps,
        options.guidance,
        options.seconds,
    )
    _check(options, sampling)
    set_backend(options.backend)
    opened = open_model(options.checkpoint)
    model = opened.model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{opened.path}: step {opened.step}", file=sys.stderr)
    if options.image:
        _describe_picture(model, options, sampling)
    elif options.modality:
        _write_contents(model, options, sampling)
    elif options.out:
        _write_freely(model, options, sampling)
    else:
        _write_texts(model, options, sampling)


def encoded(model: ARBModel, piece: Piece) -> bytes:
    """What the file of a piece holds."""
    if piece.modality == "text":
        return piece.content
    if piece.modality == "audio":
        return wav(piece.content)
    grid = getattr(model.config, piece.modality)
    if piece.modality == "image":
        return png(from_patches(piece.content, grid.patch))
    return mp4(frames_of(piece.content, grid.frames, grid.patch), grid.frames_per_second)


def _check(options: argparse.Namespace, sampling: Sampling) -> None:
    sampling.validate()
    if options.length < 1 or options.samples < 1:
        raise UserError("--length, --samples: expected at least 1")
    if options.image and (options.modality or options.out or options.prompt):
        raise UserError("--image: its caption is printed; leave out --prompt, --modality and --out")
    if options.modality and (not options.out or options.prompt):
        raise UserError(
            f"--modality {options.modality}: give --out, the folder for its files, and --caption"
            " in the place of --prompt"
        )
    if options.caption and not options.modality:
        raise UserError("--caption: give --modality too; a text goes on after --prompt")
    if options.guidance != 1 and (
        options.modality not in ("image", "video") or not options.caption
    ):
        raise UserError(
            "--guidance: goes towards a caption; give --modality image or video, --caption"
        )


def _describe_picture(model: ARBModel, options: argparse.Namespace, sampling: Sampling) -> None:
    grid = model.config.image
    try:
        pixels = decode_picture(options.image.read_bytes(), grid.patch * grid.side)
    except PICTURE_ERRORS as error:
        message = f"--image {options.image}: cannot be read as a picture ({error})"
        raise UserError(message) from error
    content_BPX = to_patches(pixels, grid.patch)[None].repeat(options.samples, axis=0)
    print(*describe(model, "image", content_BPX, options.length, sampling), sep="\n")


def _write_contents(model: ARBModel, options: argparse.Namespace, sampling: Sampling) -> None:
    captions = [options.caption.encode()] * options.samples
    contents = generate_content(model, options.modality, captions, sampling)
    for number, content in enumerate(contents):
        _write(model, options.out, f"{number:02}", Piece(options.modality, content))


def _write_freely(model: ARBModel, options: argparse.Namespace, sampling: Sampling) -> None:
    if model.output_router is None:
        raise UserError(
            f"{options.checkpoint}: has no output router to say what comes next; name --modality,"
            " or leave out --out for text alone"
        )
    for number in range(options.samples):
        seeded = Sampling(**vars(sampling) | {"seed": sampling.seed + number})
        pieces = continue_freely(model, options.prompt.encode(), options.length, seeded)
        for place, piece in enumerate(pieces):
            _write(model, options.out, f"{number:02}-{place}", piece)


def _write(model: ARBModel, folder: Path, stem: str, piece: Piece) -> None:
    path = folder / f"{stem}.{ENDINGS[piece.modality]}"
    content = encoded(model, piece)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written to ({error.strerror})") from error
    print(path)


def _write_texts(model: ARBModel, options: argparse.Namespace, sampling: Sampling) -> None:
    started = time.perf_counter()
    steps = generate(model, options.prompt.encode(), options.length, sampling, options.samples)
    symbols = list(_print(options.prompt, steps) if options.samples == 1 else steps)
    seconds = time.perf_counter() - started
    if options.samples > 1:
        for number, text in enumerate(texts(symbols), start=1):
            print(f"--- {number}\n{options.prompt}{text}")
    count = sum(symbol is not None for step in symbols for symbol in step)
    print(f"{count:,} bytes, {count / seconds:,.0f} a second", file=sys.stderr)


def _print(prompt: str, steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
    """Passes on the steps of one sample and prints its text as it comes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    for step in steps:
        if step[0] is not None:
            print(decoder.decode(bytes(step)), end="", flush=True)
        yield step
    print(decoder.decode(b"", final=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arbitor.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="a run's folder, or a file")
    add("--prompt", default="", help="how the text begins")
    add("--modality", choices=CONTENT_SYMBOLS, help="what to generate instead of text")
    add("--caption", default="", help="what it is to show or say")
    add("--image", type=Path, metavar="FILE", help="a picture to be captioned")
    add("--out", type=Path, metavar="DIR", help="folder for the files")
    add("--samples", type=int, default=1, help="how many (%(default)s)")
    add("--length", type=int, default=400, help="bytes at most (%(default)s)")
    add("--seconds", type=float, default=Sampling.seconds, help="of sound at most (%(default)s)")
    add("--steps", type=int, default=Sampling.steps, help="of Euler, a frame (%(default)s)")
    guidance = "of a picture or film towards its caption; 1 is as learned (%(default)s)"
    add("--guidance", type=float, default=Sampling.guidance, help=guidance)
    temperature = "0 takes the most likely symbol (%(default)s)"
    add("--temperature", type=float, default=Sampling.temperature, help=temperature)
    add("--top-p", type=float, default=Sampling.top_p, help="of the likely ones (%(default)s)")
    add("--seed", type=int, default=Sampling.seed, help="of the draws (%(default)s)")
    add("--backend", default="auto", choices=BACKENDS)
    return parser


if __name__ == "__main__":
    end_with(main)
