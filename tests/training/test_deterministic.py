"""`engine.deterministic`: two runs, and k + k = 2k steps, end in the same bits."""

import os
from pathlib import Path

import pytest
import torch

from latentddae.core.errors import ConfigError
from latentddae.core.precision import use_deterministic_kernels
from latentddae.models import attention

CUDA = torch.device("cuda", 0)


@pytest.fixture
def as_before(monkeypatch):
    """Process-wide switches are put back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fill, cudnn = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    cudnn.deterministic, cudnn.benchmark = before


def test_two_runs_and_a_resumed_one_end_in_the_same_bits(ranks, start, same, tmp_path) -> None:
    options = ("engine.deterministic=true", "engine.zero_stage=2", "engine.micro_batch=8")
    one, other, parts = (tmp_path / name for name in ("one", "other", "parts"))

    def train(run: Path, images: int) -> int:
        status = start(run, *options, f"total_images={images}")
        return status if torch.are_deterministic_algorithms_enabled() else 99

    for run, images in ((one, 64), (other, 64), (parts, 32), (parts, 64)):
        assert ranks(lambda run=run, images=images: train(run, images)) == [0]
    assert same(one, other) and same(one, parts)


def test_every_library_is_told(as_before) -> None:
    use_deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_a_kernel_without_an_order_is_refused(as_before, monkeypatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: object())
    attention.check("xformers", CUDA, torch.bfloat16, 64)
    use_deterministic_kernels()
    with pytest.raises(ConfigError, match=r"xformers: its backward pass adds in any order"):
        attention.check("xformers", CUDA, torch.bfloat16, 64)
    attention.check("flash", CUDA, torch.bfloat16, 64)  # it can be told, see attention.flash


def test_flash_attention_is_told(as_before, monkeypatch) -> None:
    import sys
    import types

    told = []

    def flash_attn_func(q, k, v, deterministic):
        told.append(deterministic)
        return v

    module = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    v = torch.randn(2, 3, 5, 8)
    assert torch.equal(attention.flash(v, v, v), v)
    use_deterministic_kernels()
    attention.flash(v, v, v)
    assert told == [False, True]
