"""What a line of metrics.jsonl says about a window of steps, against the plain definitions."""

from pathlib import Path

import pytest
import torch

from latentddae.training.run_metrics import (
    LEVEL_BINS,
    SUBSAMPLE_ELEMENTS,
    MetricsWindow,
    by_level,
    memory_bytes,
    speed,
    subsample,
    update_ratio,
)
from latentddae.training.step_timer import PARTS

CPU = torch.device("cpu")


def steps(count: int, batch: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(count, batch, generator=generator)
    return loss, torch.rand(count, batch, generator=generator)


def test_losses_by_quarters_of_the_noise_axis() -> None:
    level = torch.tensor([0.0, 0.1, 0.25, 0.6, 0.999, 1.0])
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    expected = [[3.0, 2.0], [4.0, 1.0], [8.0, 1.0], [48.0, 2.0]]
    assert by_level(loss, level).tolist() == expected
    assert by_level(loss.bfloat16(), level).dtype == torch.float32


def test_a_window_is_the_mean_over_its_samples() -> None:
    loss, level = steps(5)
    window = MetricsWindow()
    for i in range(5):
        window.add(64 * (i + 1), loss[i], level[i], torch.tensor(float(i)))
    row, each = window.read(CPU)
    assert row["loss"] == pytest.approx(loss.mean().item(), rel=1e-6)
    assert each == pytest.approx(loss.mean(dim=1).tolist(), rel=1e-6)
    assert row["grad_norm"] == 2.0
    for i, value in enumerate(row["loss_by_level"]):
        inside = (level >= i / LEVEL_BINS) & (level < (i + 1) / LEVEL_BINS)
        assert value == pytest.approx(loss[inside].mean().item(), rel=1e-6)


def test_skipped_steps_are_counted_and_leave_no_loss() -> None:
    loss, level = steps(3)
    window = MetricsWindow()
    for i in range(3):
        if i == 1:
            window.skip()
        else:
            window.add(64 * (i + 1), loss[i], level[i], torch.tensor(1.0))
    row, each = window.read(CPU)
    assert (window.steps, window.skipped, window.images) == (3, 1, [64, 192])
    assert row["loss"] == pytest.approx(loss[[0, 2]].mean().item(), rel=1e-6)
    assert len(each) == 2


def test_a_window_of_skipped_steps_has_no_loss() -> None:
    window = MetricsWindow()
    window.skip()
    row, each = window.read(CPU)
    assert row == {"loss": None, "loss_by_level": None, "grad_norm": None} and each == []


def test_a_level_nobody_drew_is_null() -> None:
    window = MetricsWindow()
    window.add(2, torch.ones(2), torch.tensor([0.1, 0.2]), torch.tensor(1.0))
    assert window.read(CPU)[0]["loss_by_level"] == [1.0, None, None, None]


def test_the_size_of_an_update() -> None:
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(n, generator=generator) for n in (1000, 37)]
    before = [w.clone() for w in subsample(masters)]
    assert [len(w) for w in before] == [1000, 37]  # few weights: all of them
    for master in masters:
        master.mul_(1.01)
    assert update_ratio(before, subsample(masters)) == pytest.approx(0.01, rel=1e-5)
    assert update_ratio(before, before) == 0.0


def test_of_many_weights_evenly_spread_ones_are_looked_at() -> None:
    big = torch.zeros(SUBSAMPLE_ELEMENTS + 5), torch.zeros(2 * SUBSAMPLE_ELEMENTS)
    views = subsample(list(big))
    assert sum(len(v) for v in views) <= SUBSAMPLE_ELEMENTS + 2
    big[1][3 * 1000] = 7.0  # views, not copies
    assert views[1][1000] == 7.0


SECONDS = dict(zip(PARTS, (1.0, 2.0, 4.0, 0.5, 0.25, 0.125, 0.125, 10.0), strict=True))


def test_rates_leave_out_pauses() -> None:
    row = speed(SECONDS, steps=4, global_batch=32)
    assert row["images_per_s"] == 4 * 32 / 8.0
    assert row["data_wait"] == 1 / 8
    assert row["step_ms"] == 2000
    assert row["backward_ms"] == 1000 and row["other_ms"] == 31.25
    assert sum(row[f"{part}_ms"] for part in PARTS if part != "pause") == row["step_ms"]
    assert row["pause_s"] == 10.0
    assert "flops_per_s" not in row and "utilisation" not in row


def test_achieved_operations_and_their_share_of_the_peak() -> None:
    row = speed(SECONDS, 4, 32, flops_per_image=3e9, peak_flops=480e9)
    assert row["flops_per_s"] == 16 * 3e9
    assert row["utilisation"] == pytest.approx(0.1)
    assert "utilisation" not in speed(SECONDS, 4, 32, flops_per_image=3e9)


def test_memory_is_the_most_the_process_occupied() -> None:
    held = torch.ones(64 * 2**20)  # 256 MB
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert memory_bytes(CPU) == pytest.approx(1024 * peak, rel=0.01)
    assert memory_bytes(CPU) > held.nbytes
