"""Generation: the draws, the decoder against the whole sequence, the command."""

import pytest
import torch

from arbitor import decoder as module
from arbitor.decoder import Decoder, Sampling, texts
from arbitor.errors import UserError
from arbitor.export import open_model
from arbitor.generate import generate, main
from arbitor.vocab import END_OF_DOCUMENT
from tests.arbitor.float_model import random_symbols
from tests.arbitor.test_export import save


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save(folder)
    return folder


@pytest.fixture
def model(run_folder):
    return open_model(run_folder).model


def test_greedy_follows_the_argmax_of_the_whole_sequence(model, monkeypatch):
    monkeypatch.setattr(module, "PREFILL", 7)
    monkeypatch.setattr(module, "FIRST_ROOM", 4)  # the ledger grows on the way
    prompt = bytes(random_symbols(1, 20)[0].tolist())
    steps = list(generate(model, prompt, 30, Sampling(temperature=0), batch_size=2))
    symbols = [END_OF_DOCUMENT, *prompt]
    for step in steps:
        with torch.no_grad():
            best = model.logits(torch.tensor([symbols]))[0, -1, :257].argmax().item()
        assert step == [best, best]
        symbols.append(best)


def test_a_decoder_takes_symbols_in_any_portions(model):
    symbols = random_symbols(2, 60)
    whole, portions = Decoder(model, 2), Decoder(model, 2)
    logits = whole.feed(symbols)
    for portion in symbols.split([1, 30, 1, 1, 27], dim=1):
        last = portions.feed(portion)
    assert logits.shape == (2, 288) and logits.dtype == torch.float32
    assert (logits - last).norm() < 1e-2 * logits.norm()


def test_draws_follow_the_probabilities():
    probability = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = probability.log().expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    counts = Sampling(1.0, 1.0).draw(logits, generator).bincount(minlength=4) / 20_000
    assert (counts - probability).abs().max() < 0.02  # six standard deviations
    counts = Sampling(1.0, 0.75).draw(logits, generator).bincount(minlength=4)
    assert counts[2:].sum() == 0 and abs(counts[0] / 20_000 - 2 / 3) < 0.02
    sharp = Sampling(0.5, 1.0).draw(logits, generator).bincount(minlength=4) / 20_000
    assert abs(sharp[0] - 0.25 / (0.25 + 0.0625 + 2 * 0.015625)) < 0.02
    assert Sampling(0.0, 1.0).draw(logits, generator).sum() == 0


def test_the_seed_decides_the_samples(model):
    def sample(seed):
        return texts(list(generate(model, b"ab", 20, Sampling(1.0, 1.0, seed), batch_size=3)))

    assert sample(1) == sample(1) != sample(2)
    assert len(set(sample(1))) == 3


def test_a_document_ends_for_its_sample_alone(model, monkeypatch):
    drawn = iter([[97, 98], [END_OF_DOCUMENT, 99], [100, END_OF_DOCUMENT]])
    monkeypatch.setattr(Sampling, "draw", lambda *_: torch.tensor(next(drawn)))
    steps = list(generate(model, b"", 10, Sampling(), batch_size=2))
    assert steps == [[97, 98], [None, 99], [None, None]]
    assert texts(steps) == ["a", "bc"]


def test_the_command_prints_prompt_and_text(run_folder, capsys):
    main(["--checkpoint", str(run_folder), "--prompt", "So", "--length", "12", "--seed", "3"])
    alone = capsys.readouterr()
    assert alone.out.startswith("So") and "step 3" in alone.err and "a second" in alone.err
    main(["--checkpoint", str(run_folder), "--prompt", "So", "--length", "12", "--samples", "2"])
    assert capsys.readouterr().out.count("\nSo") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature: expected 0 to 100, got -1"),
        (["--top-p", "0"], "--top-p: expected more than 0"),
        (["--length", "0"], "expected at least 1"),
        (["--seed", "-1"], r"--seed: expected 0 to 2\^32 - 1, got -1"),
        (["--seed", str(2**64)], "--seed: expected 0 to"),
        (["--image", "x.png", "--prompt", "So"], "--image: .* leave out --prompt,"),
        (["--prompt", "So", "--out", "x", "--guidance", "2"], "--guidance: .* --caption"),
        (["--modality", "audio", "--out", "x", "--guidance", "2"], "--guidance: .* --caption"),
    ],
)
def test_a_mistake_names_the_flag(arguments, message, run_folder):
    with pytest.raises(UserError, match=message):
        main(["--checkpoint", str(run_folder), *arguments])
