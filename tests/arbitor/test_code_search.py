"""The nearest code: exact search, and search among the candidates of a sign hash."""

import pytest
import torch
import torch.nn.functional as F

from arbitor import code_search
from arbitor.code_search import nearest_codes
from arbitor.vq import CODE_WIDTH


@pytest.mark.parametrize("num_codes", [1, 7, 300])
@pytest.mark.parametrize("elements", [1 << 24, 64])  # the second: many small pieces
def test_search_finds_the_row_of_largest_cosine(num_codes, elements, monkeypatch):
    monkeypatch.setattr(code_search, "_PIECE_ELEMENTS", elements)
    random = torch.Generator().manual_seed(num_codes)
    codebook = torch.randint(-1, 2, (num_codes, CODE_WIDTH), generator=random).bfloat16()
    searched = torch.randn(21, CODE_WIDTH, generator=random)
    codes = nearest_codes(searched, codebook)
    for row, code in zip(searched.double(), codes.tolist(), strict=True):
        cosines = [float(F.cosine_similarity(row, c, dim=0)) for c in codebook.double()]
        # float32 sums of 64 products of size 1: 64 * 2^-24 at most.
        assert cosines[code] >= max(cosines) - 4e-6
    assert (nearest_codes(5 * searched, codebook) == codes).all()


def test_the_first_of_equal_codes_wins_and_an_empty_one_never(monkeypatch):
    monkeypatch.setattr(code_search, "_PIECE_ELEMENTS", 4)
    codebook = torch.zeros(5, CODE_WIDTH)
    codebook[[1, 4], :3] = 1
    codebook[2] = -1
    searched = torch.full((2, CODE_WIDTH), 0.5)
    assert nearest_codes(searched, codebook).tolist() == [1, 1]


@pytest.fixture
def hashed(monkeypatch):
    """Candidates alone are compared: about an eighth of the codes below."""
    monkeypatch.setattr(code_search, "EXACT_CODES", 0)
    monkeypatch.setattr(code_search, "CANDIDATES", 16)


def random_codes(num_codes=4096):
    random = torch.Generator().manual_seed(0)
    codebook = torch.randint(-1, 2, (num_codes, CODE_WIDTH), generator=random).bfloat16()
    noise = torch.randn(257, CODE_WIDTH, generator=random)
    return codebook, noise


def test_every_code_is_found_where_it_is(hashed):
    codebook, _ = random_codes()
    found = nearest_codes(0.3 * codebook.float(), codebook)
    assert torch.equal(codebook[found], codebook)


def test_near_a_code_the_search_finds_what_the_exact_one_finds(hashed, monkeypatch):
    codebook, noise = random_codes()
    searched = codebook[: len(noise)].float() + 0.3 * noise
    found = nearest_codes(searched, codebook)
    monkeypatch.setattr(code_search, "EXACT_CODES", len(codebook))
    assert (found == nearest_codes(searched, codebook)).double().mean() > 0.98


def test_what_a_position_finds_does_not_depend_on_the_others(hashed, monkeypatch):
    codebook, noise = random_codes()
    found = nearest_codes(noise, codebook)
    order = torch.randperm(len(noise), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(code_search, "_PIECE_ELEMENTS", 1)  # a position at a time
    assert torch.equal(nearest_codes(noise[order], codebook), found[order])
