"""Planted shapes are segmented, a shifted image is matched, scores equal their definitions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentddae.core.errors import DataError, run_command
from latentddae.core.files import read_checked_json, write_checked_json
from latentddae.data.encoding.autoencoder import open_autoencoder
from latentddae.data.latents import LatentSpec
from latentddae.diffusion.flow import Flow
from latentddae.models import zoo
from latentddae.models.dit_config import DiTConfig
from latentddae.transfer import correspond, segment
from latentddae.transfer.correspond import Pair
from latentddae.transfer.extraction import token_maps
from latentddae.transfer.probes import metrics
from latentddae.transfer.segment import IGNORED, SegmentTraining

SIDE = 32  # pixels
PATCH = 2
QUICK = ("--steps", "150", "--lr", "0.03")
COLOURS = np.array([[20, 20, 20], [230, 40, 40], [40, 60, 230], [60, 220, 60]])


@pytest.fixture(scope="module")
def pixels_checkpoint(tmp_path_factory) -> Path:
    """Block 1 as initialised is a patch embedding; large weights dwarf the position table."""
    config = DiTConfig(
        input_size=SIDE, patch_size=PATCH, in_channels=3, hidden_size=24, depth=2, num_heads=2,
        num_classes=0,
    )  # fmt: skip
    state = zoo.build(config, seed=1).state_dict()
    state["x_embedder.proj.weight"] *= 1000
    return zoo.save(
        tmp_path_factory.mktemp("pixels") / "export",
        model=config,
        objective=Flow(),
        latents=LatentSpec(kind="image", channels=3, size=SIDE),
        weights={"model": state, "ema": state},
        info={"images_seen": 0, "classes": []},
    )


def shapes(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of coloured boxes on a dark ground, edges on token borders, and its class ids."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for kind in (1, 2, 3):
        top, left = (PATCH * random.integers(0, 10, 2)).tolist()
        height, width = (PATCH * random.integers(3, 7, 2)).tolist()
        mask[top : top + height, left : left + width] = kind
    noise = random.normal(0, 8, (SIDE, SIDE, 3))
    return (COLOURS[mask] + noise).clip(0, 255).astype(np.uint8), mask


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for number in range(count):
            image, mask = shapes(random)
            mask[0] = IGNORED
            Image.fromarray(image).save(root / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")
    return root


def command(name: str, module, checkpoint: Path, data: Path, out: Path, *more: str) -> int:
    argv = ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out)]
    return run_command(name, module.main, [*argv, "--block", "1", "--level", "0", *more])


def test_planted_shapes_are_segmented(pixels_checkpoint, shapes_folder, tmp_path, capsys) -> None:
    assert command("segment", segment, pixels_checkpoint, shapes_folder, tmp_path, *QUICK) == 0
    (line,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert line["values"]["miou"] > 0.9 and line["n_seen"] == {"train": 24, "test": 8}
    assert len(line["values"]["iou"]) == 4 and "mIoU" in capsys.readouterr().out
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {".latentddae", "results.jsonl"}  # no tokens left behind
    assert command("segment", segment, pixels_checkpoint, shapes_folder, tmp_path, *QUICK) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1  # the same again


def test_wrong_masks_are_not_learned(pixels_checkpoint, shapes_folder, tmp_path) -> None:
    """Masks of other images: far below the true ones."""
    root = tmp_path / "shuffled"
    for split in ("train", "test"):
        (root / split / "masks").mkdir(parents=True)
        (root / split / "images").symlink_to(shapes_folder / split / "images")
        masks = sorted((shapes_folder / split / "masks").iterdir())
        for own, other in zip(masks, masks[1:] + masks[:1], strict=True):
            (root / split / "masks" / own.name).symlink_to(other)
    assert command("segment", segment, pixels_checkpoint, root, tmp_path / "out", *QUICK) == 0
    line = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert line["values"]["miou"] < 0.5


def test_miou_equals_sets_of_pixels() -> None:
    """Intersection over union of pixel sets, directly; an absent class counts nowhere."""
    random = np.random.default_rng(0)
    mask, answer = (random.integers(0, 3, (20, 30)) for _ in range(2))
    table = metrics.confusion(answer.ravel(), mask.ravel(), 4)
    found, each = metrics.mean_iou(table)
    direct = [
        ((mask == k) & (answer == k)).sum() / ((mask == k) | (answer == k)).sum() for k in range(3)
    ]
    assert each[:3] == pytest.approx(direct) and each[3] is None
    assert found == pytest.approx(np.mean(direct))
    with pytest.raises(DataError):
        metrics.mean_iou(np.zeros((2, 2), np.int64))


def test_token_class_fractions_count_pixels() -> None:
    random = np.random.default_rng(1)
    mask = random.integers(0, 3, (8, 12)).astype(np.uint8)
    mask[0, :4] = IGNORED
    found = segment.token_class_fractions(mask, 4, 3)
    for row in range(4):
        for column in range(4):
            cell = mask[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            np.testing.assert_allclose(found[row, column], [(cell == k).mean() for k in range(3)])
    assert found.sum() == pytest.approx(16 - 4 / 6, rel=1e-6)


def test_a_target_of_fractions_is_the_loss_of_every_pixel() -> None:
    """Cross-entropy against fractions equals that of all pixels with their token's logits."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 4, 3, generator=random)
    mask = torch.randint(0, 3, (8, 8), generator=random)
    mask[2, 2] = IGNORED
    shares = torch.from_numpy(segment.token_class_fractions(mask.numpy().astype(np.uint8), 4, 3))
    found = -(shares * logits.log_softmax(dim=-1)).sum() / shares.sum()
    pixels = logits.repeat_interleave(2, 0).repeat_interleave(2, 1)
    expected = torch.nn.functional.cross_entropy(
        pixels.flatten(0, 1), mask.flatten(), ignore_index=IGNORED
    )
    torch.testing.assert_close(found, expected)


def test_answers_are_as_large_as_their_tokens() -> None:
    """Three tokens in a row over twelve pixels: four each."""
    layer = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.eye_(layer.weight)
    tokens = 20 * torch.eye(2)[torch.tensor([0, 1, 0])].expand(3, 3, 2)
    answer = segment.predict(layer, tokens, 6, 12)
    assert answer.shape == (6, 12) and (answer == [0] * 4 + [1] * 4 + [0] * 4).all()


def test_the_folded_layer_reads_tokens_as_they_are() -> None:
    """Standardisation is inside the weights: tokens with an offset and a scale of their own."""
    random = np.random.default_rng(0)
    kinds = random.integers(0, 2, (20, 4, 4))
    tokens = (np.stack([kinds, random.normal(size=kinds.shape)], -1) * [3, 50] + [100, -7]).astype(
        np.float16
    )
    layer = segment.fit(
        tokens, np.eye(2, dtype=np.float32)[kinds], SegmentTraining(steps=120, lr=0.05)
    )
    answer = layer(torch.from_numpy(tokens.astype(np.float32))).argmax(dim=-1)
    assert (answer.numpy() == kinds).mean() > 0.99


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory) -> Path:
    """A texture, and the same moved by whole tokens: (4, 6) pixels right and down at 32 pixels."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "images").mkdir()
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (SIDE // PATCH, SIDE // PATCH, 3)).astype(np.uint8)
    texture = coarse.repeat(PATCH, 0).repeat(PATCH, 1)
    moved = np.roll(texture, (6, 4), axis=(0, 1))
    for name, image in (("a", texture), ("b", moved)):
        large = Image.fromarray(image).resize((SIDE, 2 * SIDE), Image.Resampling.NEAREST)
        large.save(root / "images" / f"{name}.png")
    # middles of tokens of 2 x 4 pixels in an image twice as high as wide
    points = [[2 * c + 0.5, 4 * r + 1.5] for c, r in ((1, 1), (5, 8), (13, 12))]
    shifted = [[x + 4, y + 12] for x, y in points]
    pair = {"source": "a.png", "target": "b.png", "source_points": points, "target_points": shifted}
    (root / "pairs.json").write_text(json.dumps([pair, {**pair, "target_box": [0, 0, 20, 10]}]))
    return root


def test_a_shifted_image_is_matched_exactly(
    pixels_checkpoint, pairs_folder, tmp_path, capsys
) -> None:
    out = tmp_path / "out"
    assert command("correspond", correspond, pixels_checkpoint, pairs_folder, out) == 0
    line = json.loads((out / "results.jsonl").read_text())
    assert [row["alpha"] for row in line["values"]["pck"]] == [0.1, 0.05, 0.01]
    assert all(row["per_point"] == row["per_pair"] == 1 for row in line["values"]["pck"])
    assert line["n_seen"] == {"pairs": 2, "images": 2, "points": 6}
    assert "PCK@0.1: 100.00 %" in capsys.readouterr().out
    wrong = json.loads((pairs_folder / "pairs.json").read_text())
    for pair in wrong:  # as if the image had not moved
        pair["target_points"] = pair["source_points"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "images").symlink_to(pairs_folder / "images")
    (other / "pairs.json").write_text(json.dumps(wrong))
    assert command("correspond", correspond, pixels_checkpoint, other, tmp_path / "none") == 0
    line = json.loads((tmp_path / "none" / "results.jsonl").read_text())
    assert all(row["per_point"] == 0 for row in line["values"]["pck"])


def test_matches_find_the_best_token_of_a_planted_map() -> None:
    random = torch.Generator().manual_seed(0)
    source = torch.randn(6, 6, 16, generator=random)
    target = source.roll((1, 2), dims=(0, 1))
    points = torch.tensor([[(1 + 0.5) / 6, (3 + 0.5) / 6], [(2 + 0.5) / 6, 0.5 / 6]])
    expected = torch.tensor([[(3 + 0.5) / 6, (4 + 0.5) / 6], [(4 + 0.5) / 6, 1.5 / 6]])
    torch.testing.assert_close(correspond.matches(source, target, points), expected)
    torch.testing.assert_close(correspond.matches(source, 7 * target, points), expected)


def test_pck_counts_by_box_and_by_pair() -> None:
    near, far = np.array([0.04, 0.2]), np.array([0.09])
    found = metrics.pck([near, far], 0.1)
    assert found == {"alpha": 0.1, "per_point": pytest.approx(2 / 3), "per_pair": 0.75}
    maps = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    points = np.array([[5.5, 5.5]])  # the middle of token (1, 1) of a 16 pixel image
    away = points + [3, 4]
    sizes = [(16, 16), (16, 16)]
    whole = correspond.distances(Pair("a", "b", points, away, None), maps, maps, sizes)
    boxed = correspond.distances(Pair("a", "b", points, away, (0, 0, 10, 4)), maps, maps, sizes)
    assert whole == pytest.approx([5 / 16]) and boxed == pytest.approx([5 / 10])


def test_maps_do_not_depend_on_the_batch(pixels_checkpoint, shapes_folder, monkeypatch) -> None:
    names = token_maps.image_names(shapes_folder / "test" / "images")
    maps = token_maps.TokenMaps(
        checkpoint=zoo.load(pixels_checkpoint),
        autoencoder=open_autoencoder("none"),
        block=2,
        level=0.3,
        noise_samples=2,
        normalise=True,
    )
    whole = torch.cat(list(maps.of(shapes_folder / "test" / "images", names)))
    monkeypatch.setattr(token_maps, "IMAGE_BATCH", 3)
    parts = torch.cat(list(maps.of(shapes_folder / "test" / "images", names)))
    assert whole.shape == (8, 16, 16, 24) and (whole - parts).abs().max() < 1e-5
    single = torch.cat(list(maps.of(shapes_folder / "test" / "images", names[4:5])))
    assert (single[0] - whole[4]).abs().max() < 1e-5


def test_refusals(pixels_checkpoint, shapes_folder, pairs_folder, tmp_path, capfd) -> None:
    bad = tmp_path / "bad"
    for split in ("train", "test"):
        for folder in ("images", "masks"):
            (bad / split / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8), (9 * (split == "test"),) * 3).save(
            bad / split / "images" / "0.png"
        )
        Image.new("L", (8, 8), 5 * (split == "test")).save(bad / split / "masks" / "0.png")
    out = tmp_path / "out"
    assert command("segment", segment, pixels_checkpoint, bad, out) == 65
    assert "ids [5] are not of the 1 classes" in capfd.readouterr().err
    Image.new("RGB", (8, 8)).save(bad / "test" / "masks" / "0.png")
    assert command("segment", segment, pixels_checkpoint, bad, out) == 65
    assert "one 8-bit channel" in capfd.readouterr().err
    assert command("segment", segment, pixels_checkpoint, tmp_path / "none", out) == 78
    other = tmp_path / "other"
    shutil.copytree(pixels_checkpoint, other)
    facts = read_checked_json(other / "config.json", "a checkpoint")
    facts["latents"]["autoencoder_sha256"] = "abc"
    write_checked_json(other / "config.json", facts)
    assert command("segment", segment, other, shapes_folder, out) == 78
    assert "the latents were made with" in capfd.readouterr().err
    assert (
        command("segment", segment, pixels_checkpoint, shapes_folder, out, "--noise-samples", "0")
        == 78
    )
    (bad / "pairs.json").write_text(
        '[{"source": "a.png", "target": "b.png", "source_points": [[1, 2]], '
        '"target_points": [[1, 2], [3, 4]]}]'
    )
    assert command("correspond", correspond, pixels_checkpoint, bad, out) == 65
    assert "pair 0" in capfd.readouterr().err
    assert not out.exists()
