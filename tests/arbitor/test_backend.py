"""Choice of the backend, the paths that ops really take, and what TileLang refuses."""

import importlib.util
import sys
import warnings

import pytest
import torch

from arbitor.errors import UserError
from arbitor.kernel import backend
from arbitor.kernel import matmul as matmul_package
from arbitor.kernel.latent_update.state import trits
from arbitor.kernel.matmul.reference import matmul_forward
from arbitor.kernel.state_format import StateFormat
from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear

ON_GPU = torch.cuda.is_available()


def make_linear(activation="fp8", device="cpu", rule="latent"):
    linear = TernaryLinear(96, 40, activation)
    linear.initialize(seed=3, name="linear", format=StateFormat(rule=rule))
    return linear.to(device)


def test_auto_takes_triton_on_a_gpu_alone():
    assert backend.resolve_backend("auto") == ("triton" if ON_GPU else "torch")


def test_the_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv(backend.BACKEND_VARIABLE, "tilelang")
    assert backend.resolve_backend() == "tilelang"
    assert backend.resolve_backend("torch") == "torch"
    assert backend.active_backend() == "tilelang"


def test_an_unknown_backend_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv(backend.BACKEND_VARIABLE, "jax")
    with pytest.raises(UserError, match="auto, torch, triton, tilelang, got 'jax'"):
        backend.resolve_backend()


@pytest.mark.skipif(ON_GPU, reason="shows what happens without a GPU")
def test_triton_without_a_gpu_warns_and_runs_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.warns(UserWarning, match="needs a CUDA device"):
        assert backend.set_backend("triton") == "torch"
    with torch.no_grad():
        make_linear()(torch.randn(3, 96))
    assert backend.path_counts() == {
        ("rms_norm.forward", "torch"): 1,
        ("matmul.forward", "torch"): 1,
    }


@pytest.mark.skipif(ON_GPU, reason="the interpreter is for machines without a GPU")
def test_the_interpreter_runs_only_when_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.resolve_backend("auto") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.resolve_backend("triton") == "triton"


@pytest.mark.parametrize("activation", ["fp8", "int8"])
def test_a_linear_learns_the_same_on_both_paths(activation):
    torch.manual_seed(0)
    x, grad = torch.randn(2, 33, 96), torch.randn(2, 33, 40).bfloat16()
    results = {}
    for name in ("torch", "triton"):
        backend.set_backend(name)
        backend.clear_path_counts()
        device = "cuda" if ON_GPU and name == "triton" else "cpu"
        linear, leaf = make_linear(activation, device), x.to(device).requires_grad_()
        y = linear(leaf)
        (y + linear(leaf)).backward(grad.to(device))
        results[name] = [t.float().cpu() for t in (y, leaf.grad, linear.slot_gradient)]
        paths = backend.path_counts()
        assert {op for op, _ in paths} == {
            "rms_norm.forward",
            "matmul.forward",
            "matmul.backward_x",
            "matmul.backward_weight",
            "rms_norm.backward",
        }
        allowed = {"torch"} if name == "torch" else {"triton", "cublas"}
        assert {path for _, path in paths} <= allowed
    for ours, reference in zip(results["triton"], results["torch"], strict=True):
        # A bfloat16 rounding here and there; a code off by one moves a sum by less.
        assert (ours - reference).norm() / reference.norm() < 2**-7


@pytest.mark.parametrize("activation", ["fp8", "int8"])
def test_groups_with_scales_learn_the_same_on_both_paths(activation):
    """Norm and quantizer on their paths, the matmuls plain bfloat16 ones on both."""
    torch.manual_seed(0)
    x, grad = torch.randn(33, 96), torch.randn(33, 40).bfloat16()
    results = []
    for name in ("torch", "triton"):
        backend.set_backend(name)
        device = "cuda" if ON_GPU and name == "triton" else "cpu"
        linear, leaf = make_linear(activation, "cpu", "bigint"), x.to(device).requires_grad_()
        linear.corr_accum.random_(-500, 500, generator=torch.Generator().manual_seed(1))
        linear.step_counter.fill_(17)
        linear.to(device)
        y = linear(leaf)
        y.backward(grad.to(device))
        results.append([t.float().cpu() for t in (y, leaf.grad, linear.slot_gradient)])
    for ours, reference in zip(*results, strict=True):
        # A bfloat16 rounding here and there; a code off by one moves a sum by less.
        assert (ours - reference).norm() / reference.norm() < 2**-7


def test_an_embedding_is_the_same_on_both_paths():
    torch.manual_seed(0)
    indices, grad = torch.randint(0, 7, (2, 20)), torch.randn(2, 20, 24).bfloat16()
    results = []
    for name in ("torch", "triton"):
        backend.set_backend(name)
        backend.clear_path_counts()
        device = "cuda" if ON_GPU and name == "triton" else "cpu"
        table = TernaryEmbedding(7, 24)
        table.initialize(seed=0, name="table")
        table.to(device)
        out = table(indices.to(device))
        out.backward(grad.to(device))
        results.append((out.detach().cpu(), table.slot_gradient.cpu()))
        assert backend.path_counts() == {
            ("embedding.forward", name): 1,
            ("embedding.backward", name): 1,
        }
    for ours, reference in zip(*results, strict=True):
        assert torch.equal(ours, reference)


def test_training_with_tilelang_names_the_variable():
    backend.set_backend("tilelang")
    for rule in ("latent", "bigint"):
        with pytest.raises(UserError, match="ARB_TILELANG_TRAINING=1 to train with update.rule"):
            make_linear(rule=rule)(torch.randn(3, 96))


def test_the_variable_trains_with_the_correlation_alone(monkeypatch):
    backend.set_backend("tilelang")
    monkeypatch.setenv(backend.TILELANG_TRAINING_VARIABLE, "1")
    with pytest.raises(UserError, match="update.rule=bigint alone, got latent; set that rule"):
        make_linear()(torch.randn(3, 96))


@pytest.mark.skipif(
    importlib.util.find_spec("tilelang") is not None, reason="shows what happens without TileLang"
)
def test_tilelang_that_is_missing_says_how_to_install_it(monkeypatch):
    backend.set_backend("tilelang")
    with torch.no_grad(), pytest.raises(UserError, match=r"pip install 'arbitor\[tilelang\]'"):
        make_linear()(torch.randn(3, 96))
    monkeypatch.setenv(backend.TILELANG_TRAINING_VARIABLE, "1")
    with pytest.raises(UserError, match="not installed"):
        make_linear(rule="bigint")(torch.randn(3, 96))


class PlainMatmul:
    """Stands where TileLang's matmul would: a GPU with TileLang is needed for that one."""

    @staticmethod
    def matmul_forward(x, weight_NK, row_scale_N):
        if weight_NK.dtype == torch.int8:
            weight_NK = trits(weight_NK).bfloat16()
        return matmul_forward(x, weight_NK, row_scale_N)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["latent", "bigint"])
def test_a_packed_weight_takes_tilelang_too(rule, monkeypatch):
    monkeypatch.setitem(sys.modules, "arbitor.kernel.matmul.tilelang", PlainMatmul)
    monkeypatch.setattr(matmul_package, "tilelang", PlainMatmul, raising=False)
    linear, x = make_linear(rule=rule), torch.linspace(-1, 1, 960).view(10, 96)
    linear.pack()
    backend.set_backend("torch")
    expected = linear(x)
    backend.set_backend("tilelang")
    assert torch.equal(linear(x), expected)
    assert backend.path_counts()["matmul.forward", "tilelang"] == 1


def test_the_backward_pass_beside_tilelang_is_the_torch_paths(monkeypatch):
    """With the variable set, rule `bigint`: forward asks TileLang, the gradients are plain."""
    monkeypatch.setenv(backend.TILELANG_TRAINING_VARIABLE, "1")
    monkeypatch.setitem(sys.modules, "arbitor.kernel.matmul.tilelang", PlainMatmul)
    monkeypatch.setattr(matmul_package, "tilelang", PlainMatmul, raising=False)
    gradients = []
    for name in ("tilelang", "torch"):
        backend.set_backend(name)
        linear = make_linear(rule="bigint")
        linear(torch.linspace(-1, 1, 960).view(10, 96).requires_grad_()).sum().backward()
        gradients.append(linear.slot_gradient)
    assert backend.path_counts()["matmul.forward", "tilelang"] == 1
    assert torch.equal(*gradients)
