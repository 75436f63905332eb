"""What probes cost, against operations counted while they run; and all of them on one device."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentddae.transfer.extraction.pooling import pool_of, pool_width
from latentddae.transfer.probes import cost, knn, logistic, ridge, sgd
from latentddae.transfer.probes.cost import ProbeSize
from latentddae.transfer.probes.data import ProbeData
from latentddae.transfer.probes.recipes import RECIPES

from ..conftest import planted, third

N, TEST, WIDTH, CLASSES = 900, 120, 30, 6
SIZE = ProbeSize(train=N, heldout=300, test=TEST, width=WIDTH, classes=CLASSES)


@pytest.fixture(scope="module")
def data() -> ProbeData:
    x, y = planted(N, 0)
    test_x, test_y = planted(TEST, 1)
    return ProbeData(x, y, test_x, test_y, third(N), CLASSES)


def counted(action) -> float:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def test_operations_are_those_that_run(data) -> None:
    """Exactly for nearest neighbours and heads; within the number of L-BFGS steps for the linear
    probe, which depends on the features."""
    assert counted(lambda: knn.probe(data)) == cost.knn_cost(SIZE).flops
    real = counted(lambda: logistic.probe(data, l2_grid=(0.1, 0.01)))
    formula = cost.linear_cost(SIZE, (0.1, 0.01)).flops
    assert real / 2 < formula < 3 * real
    recipe = replace(RECIPES["ddae"], batch=100, learning_rates=(1e-3, 1e-2))  # 100 divides N
    real = counted(lambda: sgd.probe(data, recipe))
    formula = cost.heads_cost(SIZE, recipe.epochs, 2).flops
    assert real == pytest.approx(formula * (N + N - 300) / (2 * N), rel=0.02)  # and the scoring


def test_memory_of_ridge_probes_is_that_of_their_sums() -> None:
    widths = (30, 120)
    sums = [ridge.Statistics.start(torch.randn(8, width), CLASSES) for width in widths]
    held = sum(s.gram.untyped_storage().nbytes() for s in sums)
    assert cost.ridge_cost(N, widths, 6).host_bytes == held


def test_imagenet_is_large_and_digits_are_not() -> None:
    """A linear probe of a DiT-XL/2 on ImageNet: a copy of 5.9 GB and petaflops."""
    imagenet = ProbeSize(train=1_281_167, heldout=256_000, test=50_000, width=1152, classes=1000)
    linear = cost.linear_cost(imagenet)
    assert linear.host_bytes == 4 * 1152 * (2 * 1_281_167 + 50_000)
    assert 5.9e9 < linear.device_bytes < 7e9
    assert 5e14 < linear.flops < 1e15
    assert cost.linear_cost(SIZE).device_bytes < 1e6


@pytest.mark.parametrize("pool", ["mean", "max", "grid2", "grid3", "norm-grid2", "norm-mean"])
def test_widths_of_pools(pool) -> None:
    assert pool_of(pool).function(torch.zeros(1, 36, 5)).shape[1] == pool_width(pool, 5)


def test_everything_computes_where_it_is_told(data) -> None:
    """On torch's meta device, where an operation with a tensor of another device is an error."""
    x, y = torch.empty(40, 5, device="meta"), torch.empty(40, dtype=torch.int64, device="meta")
    start = logistic.Softmax.zero(5, 3, "meta")
    loss, weight, bias = logistic.objective(x, y, start.weight, start.bias, 0.1)
    assert {t.device.type for t in (loss, weight, bias, logistic.predict(start, x))} == {"meta"}
    assert logistic.second_moment(x).device.type == "meta"
    assert knn.normalised(np.zeros((4, 5)), "meta").device.type == "meta"
    sums = ridge.Statistics.start(x, 3)
    sums.add(x, y)
    assert all(t.device.type == "meta" for t in (sums.shift, sums.gram, sums.class_sums))
    heads = sgd.HeadTrainer(RECIPES["mae"], [(0.1, 0.0)], width=5, classes=3, like=x)
    heads.train_epoch(x, y)
    assert heads.heads.weight.device.type == "meta"
    assert heads.heads.predict(x).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_a_cpu_finds(data) -> None:
    for probe in (logistic.probe, knn.probe):
        cpu, gpu = probe(data), probe(data, device="cuda")
        assert (cpu.predictions == gpu.predictions).mean() > 0.99
        assert cpu.heldout_accuracy == pytest.approx(gpu.heldout_accuracy, abs=0.01)
    recipe = RECIPES["ddae"]
    cpu, gpu = sgd.probe(data, recipe), sgd.probe(data, recipe, device="cuda")
    assert cpu.accuracy == pytest.approx(gpu.accuracy, abs=0.02)
