"""The training script learns, repeats itself and writes what the encoder opens."""

from pathlib import Path

import torch

from latentddae.core.errors import run_command
from latentddae.data.encoding.autoencoder import open_autoencoder
from latentddae.data.encoding.train_autoencoder import batches, main, train


def test_batches_show_every_image_once_an_epoch() -> None:
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    stream = batches(pixels, batch=4, seed=0)
    seen = [((next(stream)[0][:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for _ in range(5)]
    flat = [value for batch in seen for value in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_some_steps_lower_the_error_and_repeat_exactly() -> None:
    ramp = torch.linspace(0, 255, 16).to(torch.uint8)
    pixels = torch.stack([ramp.expand(16, 16), ramp.flip(0).expand(16, 16)]).repeat(8, 1, 1)
    pixels = pixels[:, None].expand(16, 3, 16, 16).contiguous()
    _, start = train(pixels, steps=1, batch=8, seed=0)
    first, end = train(pixels, steps=30, batch=8, seed=0)
    assert end < 0.7 * start
    second, again = train(pixels, steps=30, batch=8, seed=0)
    assert again == end
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_written_folder_opens_at_unit_scale(photos: Path, tmp_path: Path) -> None:
    flags = ["--source", str(photos), "--steps", "2", "--batch", "4", "--out", str(tmp_path / "ae")]
    assert run_command("train_autoencoder", main, flags) == 0
    autoencoder = open_autoencoder(str(tmp_path / "ae"))
    spec = autoencoder.spec(32)
    assert (spec.kind, spec.channels, spec.size) == ("moments", 4, 8)
    assert run_command("train_autoencoder", main, flags) == 78  # never over an existing folder
