"""What the model writes at a step of a run: files in the run's folder, which MLflow gets too."""

from pathlib import Path

from arbitor.decoder import Sampling, texts
from arbitor.generate import generate
from arbitor.main import ARBModel

FOLDER = "samples"  # in the run's folder
_SAMPLES = 4
_LENGTH = 256


def write_samples(model: ARBModel, run_folder: Path, step: int) -> Path:
    """Documents from their beginning, by the default sampling: the same seed at every step."""
    symbols = list(generate(model, b"", _LENGTH, Sampling(), _SAMPLES))
    path = run_folder / FOLDER / f"step-{step:08d}.txt"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    numbered = enumerate(texts(symbols), start=1)
    partial.write_text("".join(f"--- {number}\n{text}\n" for number, text in numbered))
    partial.rename(path)
    return path
