"""Reference curves: a run of the recipe is inside, a wrong one is outside and says where."""

import json
import random
from pathlib import Path

import pytest

from latentddae import cli
from latentddae.core import config as configuration
from latentddae.core import files
from latentddae.core.errors import DataError
from latentddae.training import reference_curve
from latentddae.training.config import TrainConfig

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, seed: int, scale: float = 1.0, top: float = 1.0) -> Path:
    """A falling loss with 1 % noise; `top` scales the noisiest quarter alone."""
    noise = random.Random(seed)
    for step in range(1, 41):
        base = scale * (0.5 + 2 / step)
        parts = [base * f * (1 + 0.01 * noise.gauss(0, 1)) for f in (1.6, 1.0, 0.7, 0.7 * top)]
        row = {"images": 128 * step, "loss": sum(parts) / 4, "loss_by_level": parts}
        files.append_json_line(folder / "metrics.jsonl", row)
    return folder


@pytest.fixture
def reference(tmp_path) -> Path:
    runs = [str(write_run(tmp_path / f"r{seed}", seed)) for seed in range(3)]
    path = tmp_path / "reference.json"
    assert cli.run(["compare-curve", *runs, "--write", str(path), "--recipe", "toy"]) == 0
    return path


def test_reference_is_mean_and_spread(reference, tmp_path) -> None:
    point = json.loads(reference.read_text())["points"][4]
    values = [
        reference_curve.losses(tmp_path / f"r{seed}")[point["images"]][0] for seed in range(3)
    ]
    mean = sum(values) / 3
    assert point["mean"][0] == pytest.approx(mean)
    assert point["sd"][0] == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    assert len(point["mean"]) == 5


def test_another_seed_is_inside(reference, tmp_path, capsys) -> None:
    run = write_run(tmp_path / "mine", 99)
    assert cli.run(["compare-curve", str(run), "--reference", str(reference)]) == 0
    assert "inside (40 points" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"scale": 1.2}, {"scale": 0.8}, {"top": 1.3}])
def test_a_wrong_curve_is_outside(change, reference, tmp_path, capsys) -> None:
    """Also when only one quarter of the noise axis is off."""
    run = write_run(tmp_path / "mine", 99, **change)
    assert cli.run(["compare-curve", str(run), "--reference", str(reference)]) == 1
    assert "outside the band" in capsys.readouterr().err


def test_nan_is_outside(reference, tmp_path) -> None:
    rows = reference_curve.compare(
        reference_curve.losses(write_run(tmp_path / "mine", 5)), json.loads(reference.read_text())
    )
    assert reference_curve.is_inside(rows)
    assert not reference_curve.is_inside([row._replace(distance=float("nan")) for row in rows])


def test_a_run_whose_steps_were_all_skipped_is_outside(reference, tmp_path) -> None:
    """Its rows have no loss at all."""
    for step in range(1, 41):
        row = {"images": 128 * step, "loss": None, "loss_by_level": None}
        files.append_json_line(tmp_path / "skipped" / "metrics.jsonl", row)
    points = reference_curve.compare(
        reference_curve.losses(tmp_path / "skipped"), json.loads(reference.read_text())
    )
    assert len(points) == 40 and not reference_curve.is_inside(points)


def test_the_shipped_reference_is_of_the_shipped_recipe() -> None:
    shipped = json.loads((ROOT / "configs" / "curves" / "demo.json").read_text())
    assert shipped["runs"] == 3
    recipe = configuration.load(TrainConfig, ROOT / "configs" / "pretrain" / "demo.yaml", [])
    seen = [point["images"] for point in shipped["points"]]
    assert seen[-1] == recipe.total_images
    assert all(images % recipe.global_batch == 0 for images in seen)
    assert shipped["points"][-1]["mean"][0] < 0.25 * shipped["points"][0]["mean"][0]


def test_bad_input(reference, tmp_path, capsys) -> None:
    run = str(write_run(tmp_path / "mine", 5))
    assert cli.run(["compare-curve", run]) == 2
    assert cli.run(["compare-curve", str(tmp_path), "--reference", str(reference)]) == 78
    assert cli.run(["compare-curve", run, "--write", str(tmp_path / "x.json")]) == 2
    files.append_json_line(
        tmp_path / "other" / "metrics.jsonl", {"images": 7, "loss": 1.0, "loss_by_level": [1.0] * 4}
    )
    with pytest.raises(DataError, match="no point"):
        reference_curve.compare(
            reference_curve.losses(tmp_path / "other"), json.loads(reference.read_text())
        )
