"""Fixtures of the model's tests: the choice of the backend, buffers that start as nonsense."""

import pytest
import torch

from arbitor.kernel import backend


@pytest.fixture(autouse=True)
def fresh_backend(monkeypatch):
    """No choice has been made, nothing has been counted; afterwards as before."""
    monkeypatch.setattr(backend, "_active", None)
    monkeypatch.delenv(backend.BACKEND_VARIABLE, raising=False)
    monkeypatch.delenv(backend.TILELANG_TRAINING_VARIABLE, raising=False)
    backend.clear_path_counts()
    yield
    backend.clear_path_counts()


@pytest.fixture
def poisoned(monkeypatch):
    """What torch.empty and torch.empty_like allocate starts as NaN or the largest integers."""

    def filled(allocate):
        def poison(*shape, **options):
            buffer = allocate(*shape, **options)
            is_float = buffer.is_floating_point()
            return buffer.fill_(torch.nan if is_float else torch.iinfo(buffer.dtype).max)

        return poison

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
