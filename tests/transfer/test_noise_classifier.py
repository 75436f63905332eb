"""The noise-conditional classifier: one head for all levels, keyed draws, a curve that
falls with noise.
"""

import json
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentddae.core import rng
from latentddae.core.errors import ConfigError, run_command
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import Batch
from latentddae.data.subsets import Subset
from latentddae.diffusion.ddpm import DDPM
from latentddae.diffusion.edm import EDM
from latentddae.diffusion.flow import Flow
from latentddae.models import zoo
from latentddae.transfer import noise_classifier, noise_control, results
from latentddae.transfer.extraction import extract
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.noise_classifier import Head, HeadTraining, Reader

from .conftest import crossings

PLACES = tuple(product(range(5), range(5)))


@pytest.fixture
def reader(checkpoint_folder) -> Reader:
    return Reader(zoo.load(checkpoint_folder), block=2)


def test_features_are_those_of_the_extractor(reader, checkpoint, train) -> None:
    """At one common time they equal what every other probe reads."""
    index = np.arange(8)
    x0 = extract.clean_latents(reader.latents, train, index)
    noise = extract.keyed_noise(5, 0, rng.key_positions(train.keys(index)), x0.shape[1:])
    found = reader.features(x0, noise, torch.full((8,), 0.3))
    spec = FeatureSpec(level=0.3, blocks=(2,), seed=5)
    expected = extract.collect(checkpoint, train, index, spec)[spec.cell]
    scale = np.abs(expected).mean()
    assert np.abs(found.numpy() - expected).max() < 0.05 * scale  # bf16 where there is any
    mixed = reader.features(x0, noise, torch.linspace(0, 0.9, 8))
    assert (mixed[3] - found[3]).abs().max() > 0.01 * scale


def test_head_knows_the_level() -> None:
    head = Head(8, classes=3)
    x = torch.ones(2, 8)
    logits = head(x, torch.tensor([0.1, 0.8]))
    assert logits.shape == (2, 3) and (logits[0] - logits[1]).abs().max() > 1e-3


def test_every_draw_follows_from_the_position(reader, train) -> None:
    """The same images seen give the same features, levels and labels; levels cover the axis."""
    from latentddae.data.loader import Loader

    loader = Loader(train, global_batch=64, seed=0, workers=0)
    once, again = (
        noise_classifier.training_batch(reader, loader.batch_at(64), 3) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    level = once[1]
    assert level.min() < 0.1 and level.max() > 0.9 and level.unique().numel() == 64
    assert not torch.equal(level, noise_classifier.training_batch(reader, loader.batch_at(0), 3)[1])


def test_images_are_cropped_and_mirrored_anew_at_every_visit() -> None:
    """Latents are not, and may not be."""
    training = HeadTraining()
    image, latents = (SimpleNamespace(kind=kind) for kind in ("image", "moments"))
    assert (training.padding(image), training.padding(latents)) == (4, 0)
    assert HeadTraining(crop_padding=2).padding(image) == 2
    with pytest.raises(ConfigError, match="--crop-padding"):
        HeadTraining(crop_padding=2).padding(latents)

    spec = LatentSpec(kind="image", channels=3, size=8, scaling_factor=1.0, views=("original",))
    seen = SimpleNamespace(
        latents=spec,
        device=torch.device("cpu"),
        objective=DDPM(preset="ddae"),
        features=lambda x0, noise, t: x0,
    )
    one = torch.randint(1, 256, (1, 3, 8, 8), dtype=torch.uint8)
    label = torch.zeros(64, dtype=torch.int64)
    number = torch.arange(64)
    batch = Batch(one.expand(64, 3, 8, 8).contiguous(), label, number, number, start=0)
    plain, cropped = (noise_classifier.training_batch(seen, batch, 0, k)[0] for k in (0, 2))
    assert plain.unique(dim=0).shape[0] == 1 and cropped.unique(dim=0).shape[0] > 20
    windows = [image[:, i : i + 8, j : j + 8] for image in mirrors(one) for i, j in PLACES]
    allowed = torch.stack(windows).float() / 127.5 - 1
    distance = (cropped[:, None] - allowed).abs().flatten(2).amax(dim=2).amin(dim=1)
    assert distance.max() < 1e-5


def mirrors(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first image padded with 2 black pixels, and the same mirrored."""
    padded = torch.nn.functional.pad(images[0], (2, 2, 2, 2))
    return padded, padded.flip(-1)


@pytest.mark.parametrize(
    ("objective", "level", "told"),
    [
        (DDPM(preset="ddae"), DDPM(preset="ddae").to_level(torch.tensor(500.0)), 0.5),
        (Flow(), 0.25, 0.25),
        (Flow(time="data"), 0.25, 0.75),
        (EDM(), 2 / 3, math.log(2)),
        (EDM(), 0.0, math.log(1e-4 / (1 - 1e-4))),  # a clean image
    ],
)
def test_the_control_is_told_what_song_et_al_tell_it(objective, level, told) -> None:
    levels = torch.as_tensor(level, dtype=torch.float64).reshape(1)
    assert noise_control.told_level(objective, levels).item() == pytest.approx(told, rel=1e-5)


def test_planted_classes_are_read_where_there_is_signal(reader, train, test_set) -> None:
    part = Subset(train, np.arange(len(train)))
    head = noise_classifier.train_head(
        reader, part, HeadTraining(epochs=60, lr=3e-3, batch=32), show_progress=False
    )
    curve = noise_classifier.accuracy_curve(reader, head, test_set, seed=0)
    assert len(curve) == 20 and [row["level"] for row in curve] == sorted(
        row["level"] for row in curve
    )
    assert curve[0]["accuracy"] > 0.9  # almost clean
    assert curve[-1]["level"] == 1.0 and curve[-1]["accuracy"] < 0.6  # pure noise: chance is 0.25


def test_training_is_repeatable(reader, train) -> None:
    part, settings = Subset(train, np.arange(40)), HeadTraining(epochs=2, batch=16)
    first, second = (
        noise_classifier.train_head(reader, part, settings, show_progress=False) for _ in range(2)
    )
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_levels_of_a_ddpm_are_those_of_the_paper() -> None:
    """DDAE scores at t = 1, 51, ..., 951."""
    times = DDPM(preset="ddae").sampling_timesteps(20).flip(0)
    assert times.tolist() == [1 + 50 * k for k in range(20)]


def test_command(checkpoint_folder, tiny_shards, tmp_path, capsys) -> None:
    argv = ["--checkpoint", str(checkpoint_folder), "--data", str(tiny_shards), "--block", "2"]
    argv += ["--out", str(tmp_path), "--epochs", "1", "--limit", "40"]
    assert run_command("noise-classifier", noise_classifier.main, argv) == 0
    (result,) = results.read(tmp_path / "results.jsonl")
    assert json.loads((tmp_path / "noise-classifier-block-2.json").read_text())["id"] == result.id
    assert result.n_seen == {"train": 40, "test": 32} and len(result.values["curve"]) == 20
    assert (tmp_path / "noise-classifier-block-2.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("%") == 20
    assert run_command("noise-classifier", noise_classifier.main, [*argv, "--epochs", "0"]) == 78


def test_neither_training_nor_the_curve_waits_between_batches(
    reader, train, test_set, monkeypatch
) -> None:
    """What the head sees of a batch is made without a look at it; a curve of three times the
    batches reads nothing more."""
    from latentddae.data.loader import Loader

    head = Head(reader.width, len(train.classes))
    batch = Loader(train, global_batch=32, seed=0, workers=0).batch_at(0)
    with crossings(monkeypatch) as found:
        noise_classifier.training_batch(reader, batch, 0)
    assert not found

    def of_curve(batch: int) -> list[object]:
        monkeypatch.setattr(noise_classifier, "TEST_BATCH", batch)
        with crossings(monkeypatch) as reads:
            noise_classifier.accuracy_curve(reader, head, test_set, seed=0, count=3)
        return reads

    assert of_curve(-(-len(test_set) // 3)) == of_curve(len(test_set))
