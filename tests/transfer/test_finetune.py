"""Fine-tuning: exact resume, the same on any ranks, layer decay and drop path by formula."""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data.mixup
import torch
from safetensors.torch import load_file

from latentddae.core import config as configuration
from latentddae.core import files
from latentddae.core.errors import run_command
from latentddae.data.loader import Loader
from latentddae.data.shards import ShardSet
from latentddae.data.subsets import Subset, shard_layout
from latentddae.models import zoo
from latentddae.models.untrained import randomize_gates
from latentddae.training import state_reader, states
from latentddae.transfer import finetune, results
from latentddae.transfer.finetuning.classifier import Classifier, drop_path, layer_decay
from latentddae.transfer.finetuning.mixup import (
    MixConfig,
    mix_of,
    mixed_images,
    mixed_targets,
    smoothed,
)

CONFIG = Path(__file__).parent / "finetune.yaml"
STEP = 16
EVERYTHING = (  # every draw there is
    "drop_path=0.5", "layer_decay=0.7", "mix.mixup=0.8", "mix.cutmix=1.0", "mix.smoothing=0.1",
    "noisy_input=true", "norm=affine", "level=0.2",
)  # fmt: skip


@pytest.fixture
def start(checkpoint_folder, tiny_shards):
    def run(out: Path, *overrides: str, checkpoint: Path = checkpoint_folder) -> int:
        given = ["--checkpoint", str(checkpoint), "--data", str(tiny_shards), "--out", str(out)]
        return run_command("finetune", finetune.main, ["--config", str(CONFIG), *given, *overrides])

    return run


def tensors(run: Path, images: int) -> dict[str, torch.Tensor]:
    """All saved pieces of a state, from all ranks."""
    out: dict[str, torch.Tensor] = {}
    for path in sorted((run / "state" / f"images-{images:012d}").glob("*.safetensors")):
        out |= load_file(path)
    return out


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in files.read_json_lines(run / "metrics.jsonl") if "loss" in row]


def result(run: Path) -> results.Result:
    (line,) = results.read(run / "results.jsonl")
    return line


@pytest.mark.parametrize("size", [1, 2])
def test_interrupted_equals_uninterrupted(size, start, tmp_path, ranks) -> None:
    """10 steps + restart + 10 equal 20 steps bit for bit, with every kind of draw."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = (*EVERYTHING, "engine.micro_batch=4")
    assert ranks(lambda: start(whole, *options), size) == [0] * size
    for total in (10 * STEP, 20 * STEP):
        stage = (*options, f"total_images={total}")
        assert ranks(lambda: start(parts, *stage), size) == [0] * size  # noqa: B023
    expected, seen = tensors(whole, 20 * STEP), tensors(parts, 20 * STEP)
    assert expected.keys() == seen.keys() and expected
    assert all(torch.equal(expected[key], seen[key]) for key in expected)
    assert losses(whole) == losses(parts)
    lines = results.read(parts / "results.jsonl")
    assert [line.n_seen["images"] for line in lines] == [10 * STEP, 20 * STEP]
    assert lines[-1].accuracy == result(whole).accuracy


def test_one_and_two_ranks_see_the_same_run(start, tmp_path, ranks) -> None:
    """Same samples, partners and draws: only the order of summation differs; one score each."""
    one, two = tmp_path / "1", tmp_path / "2"
    assert ranks(lambda: start(one, *EVERYTHING)) == [0]
    assert ranks(lambda: start(two, *EVERYTHING), 2) == [0, 0]
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-5)
    a, b = result(one), result(two)
    assert a.n_seen == b.n_seen
    name = "heldout_accuracy_model"
    assert a.values[name] == pytest.approx(b.values[name], abs=0.1)


def test_a_trained_trunk_learns_planted_classes(start, tmp_path, ranks) -> None:
    run = tmp_path / "run"
    options = ("total_images=1600", "eval_every_images=800", "log_every_images=160")
    assert ranks(lambda: start(run, *options)) == [0]
    line = result(run)
    assert line.accuracy == 1.0 and line.n_seen["test"] == 32
    assert line.n_seen["train"] + line.n_seen["heldout"] == 96
    assert losses(run)[-1] < 0.2 * losses(run)[0]
    looks = [
        r for r in files.read_json_lines(run / "metrics.jsonl") if r.get("event") == "evaluation"
    ]
    assert [r["images"] for r in looks] == [800, 1600]
    assert ranks(lambda: start(run, *options)) == [0]  # finished: nothing to train, the same line
    assert result(run) == line


def test_heldout_samples_are_never_trained_on(checkpoint, tiny_shards) -> None:
    train = ShardSet(tiny_shards, "train")
    rows = np.flatnonzero(np.arange(96) % 5 != 0)
    part = Subset(train, rows)
    batches = Loader(part, global_batch=7, seed=0, workers=0).batches()
    seen = [next(batches) for _ in range(11)]
    index = np.concatenate([batch.index.numpy() for batch in seen])
    assert sorted(index[:76].tolist()) == sorted(set(index.tolist()))  # one epoch, each once
    keys = part.keys(index)
    assert set(keys) <= set(train.keys(rows))
    for batch in seen:
        place = rows[batch.index.numpy()]
        assert np.array_equal(batch.moments.numpy(), train.gather(place)[:, 0])
        assert np.array_equal(batch.label.numpy(), train.labels[place])
    shard = np.searchsorted(shard_layout(part).starts, index, side="right") - 1
    assert np.array_equal(shard, rows[index] // 40)


def test_from_scratch_is_fresh_and_the_default_is_not(start, tmp_path, ranks, checkpoint) -> None:
    """Weights after one step at a vanishing learning rate are the start."""
    tiny = ("optim.lr=1e-12", "total_images=16", "optim.weight_decay=0")
    runs = {"trained": (), "scratch": ("--from-scratch",)}
    for name, option in runs.items():
        assert ranks(lambda: start(tmp_path / name, *option, *tiny)) == [0]  # noqa: B023
    fresh = zoo.build(checkpoint.model.config, seed=0).state_dict()
    for name, source in (("trained", checkpoint.model.state_dict()), ("scratch", fresh)):
        (state,) = states.complete_states(tmp_path / name / "state")
        for key, value in state_reader.StateReader(state).tensors("master"):
            if key.startswith("trunk."):
                torch.testing.assert_close(
                    value, source[key.removeprefix("trunk.")], atol=1e-8, rtol=0
                )
    assert any((fresh[k] != v).any() for k, v in checkpoint.model.state_dict().items())
    assert (
        result(tmp_path / "scratch").protocol["from_scratch"]
        and not result(tmp_path / "trained").protocol["from_scratch"]
    )


def test_layer_decay_follows_the_formula(checkpoint) -> None:
    """decay^(blocks + 1 - layer): embeddings are layer 0, block k is k, the head is last."""
    model = Classifier(zoo.build(checkpoint.model.config), 2, classes=4, norm="affine")
    lr_scale = layer_decay(0.5, model.trunk)
    scales = {name: lr_scale(name) for name, _ in model.named_parameters()}
    assert {v for k, v in scales.items() if "embedder" in k} == {0.125}
    assert {v for k, v in scales.items() if k.startswith("trunk.blocks.0.")} == {0.25}
    assert {v for k, v in scales.items() if k.startswith("trunk.blocks.1.")} == {0.5}
    assert {k for k, v in scales.items() if v == 1} == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


def test_layer_decay_reaches_the_optimizer(start, tmp_path, ranks) -> None:
    """Adam's first step moves every weight by its learning rate: the ratio is the decay."""
    moved = {}
    for total in (16, 32):  # the first step leaves the trunk alone if the head is zero
        run = tmp_path / f"{total}"
        options = (
            "layer_decay=0.5",
            "optim.weight_decay=0",
            "optim.betas=[0.0,0.0]",
            "optim.lr=1e-3",
        )
        assert ranks(lambda: start(run, *options, f"total_images={total}")) == [0]  # noqa: B023
        (state,) = states.complete_states(run / "state")[-1:]
        moved[total] = dict(state_reader.StateReader(state).tensors("master"))
    step = {k: (moved[32][k] - v).abs().max().item() for k, v in moved[16].items()}
    assert step["head.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert step["trunk.blocks.1.mlp.fc2.weight"] == pytest.approx(5e-4, rel=1e-2)
    assert step["trunk.blocks.0.mlp.fc2.weight"] == pytest.approx(2.5e-4, rel=1e-2)
    assert step["trunk.x_embedder.proj.weight"] == pytest.approx(1.25e-4, rel=1e-2)


def test_drop_path_is_keyed_linear_and_unbiased() -> None:
    position = torch.arange(4000)
    factors = drop_path(0.4, 3, seed=0, position=position)
    assert factors is not None and factors.shape == (4000, 3, 2)
    assert torch.equal(factors[1000:], drop_path(0.4, 3, 0, position[1000:]))  # type: ignore[arg-type]
    dropped = (factors == 0).float().mean(dim=(0, 2))
    torch.testing.assert_close(dropped, torch.tensor([0.0, 0.2, 0.4]), atol=0.02, rtol=0)
    torch.testing.assert_close(factors.mean(dim=(0, 2)), torch.ones(3), atol=0.03, rtol=0)
    assert (factors[:, 2, 0] != factors[:, 2, 1]).any()  # attention and MLP each draw
    assert drop_path(0.0, 3, 0, position) is None


EVERY_OPTION: dict[str, Any] = {
    "qk_norm": True,
    "norm": "rms",
    "mlp": "swiglu",
    "rope": True,
    "register_tokens": 2,
    "head_width": 64,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        EVERY_OPTION,
        EVERY_OPTION | {"shared_adaln": True},
        EVERY_OPTION | {"adaln_shift": False},
    ],
)
def test_a_dropped_path_is_the_block_without_its_branch(checkpoint, options) -> None:
    """A dropped block 2 equals the trunk cut before it; dropping a sample touches no other."""
    network = zoo.build(checkpoint.model.config, seed=1, **options)
    randomize_gates(network, 2)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((3,), 0.1)

    def built(block: int) -> Classifier:
        trunk = zoo.build(network.config)
        trunk.load_state_dict(network.state_dict())
        model = Classifier(trunk, block, classes=4)
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
        return model

    one, two = built(1), built(2)
    paths = torch.ones(3, 2, 2)
    torch.testing.assert_close(two(x, t, paths), two(x, t))
    paths[1, 1] = 0
    mixed = two(x, t, paths)
    torch.testing.assert_close(mixed[1], one(x, t)[1])
    torch.testing.assert_close(mixed[[0, 2]], two(x, t)[[0, 2]])
    assert (mixed[1] - two(x, t)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_equals_timm(kind, monkeypatch) -> None:
    """The same weight and box give what timm's Mixup makes of the batch."""
    config = MixConfig(**{kind: 0.8}, smoothing=0.1)
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 2, 1, 0])
    mix = mix_of(config, seed=0, batch=3, height=8, width=8)
    reference = timm.data.mixup.Mixup(
        mixup_alpha=0.8 * (kind == "mixup"), cutmix_alpha=0.8 * (kind == "cutmix"),
        label_smoothing=0.1, num_classes=3,
    )  # fmt: skip
    monkeypatch.setattr(reference, "_params_per_batch", lambda: (mix.weight, kind == "cutmix"))
    if mix.box is not None:
        box = (mix.box, mix.weight)
        monkeypatch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", lambda *_, **__: box)
        assert 0 < (mix.box[1] - mix.box[0]) * (mix.box[3] - mix.box[2]) < 64
    expected_x, expected_y = reference(x.clone(), y)
    target = smoothed(y, 3, 0.1)
    rows = mix.rows(6)
    torch.testing.assert_close(mixed_images(x, x.flip(0), rows), expected_x)
    torch.testing.assert_close(mixed_targets(target, target.flip(0), rows), expected_y)


def test_mixing_is_keyed_by_the_batch_and_has_the_right_spread() -> None:
    config = MixConfig(mixup=0.8, cutmix=1.0)
    mixes = [mix_of(config, 0, batch, 8, 8) for batch in range(2000)]
    assert mixes[7] == mix_of(config, 0, 7, 8, 8) != mix_of(config, 1, 7, 8, 8)
    cuts = [mix for mix in mixes if mix.box is not None]
    assert abs(len(cuts) / 2000 - 0.5) < 0.04
    plain = np.array([mix.weight for mix in mixes if mix.box is None])
    assert abs(plain.mean() - 0.5) < 0.04 and abs(plain.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01


@pytest.mark.parametrize("name", ["plain", "cifar10", "ldae", "mae"])
def test_shipped_recipes_are_complete(name) -> None:
    path = Path(__file__).parents[2] / "configs" / "transfer" / f"finetune_{name}.yaml"
    told = ["checkpoint=c", "data.path=d", "run=r"]
    config = configuration.load(finetune.FinetuneConfig, path, told)
    if name in ("ldae", "mae"):  # both papers' tables
        assert config.global_batch == 1024 and config.optim.weight_decay == 0.05
        assert (config.mix.mixup, config.mix.cutmix, config.mix.smoothing) == (0.8, 1.0, 0.1)
        assert config.ema.decay(10**9, 1024) == pytest.approx(0.9999, abs=1e-8)
        assert config.drop_path == 0.1 and config.layer_decay == 0.65 and not config.noisy_input


def test_refusals(start, tmp_path, ranks, capfd) -> None:
    for override, said in (
        ("block=9", "blocks [9]"),
        ("layer_decay=0", "layer_decay"),
        ("level=2", "noise level"),
        ("mix.smoothing=1", "smoothing"),
        ("checkpoint=/nowhere", "/nowhere"),
        ("test_split=train", "split train of"),
    ):
        assert start(tmp_path / "run", override) in (2, 78)
        assert said in capfd.readouterr().err
        assert not (tmp_path / "run").exists()


def test_an_option_may_stand_between_two_settings(start, tmp_path, capfd) -> None:
    assert start(tmp_path / "run", "seed=1", "--retry", "level=2") in (2, 78)
    assert "noise level" in capfd.readouterr().err


READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__")


def test_no_value_is_read_between_two_lines(start, tmp_path, ranks) -> None:
    """With every kind of draw, ten more steps read nothing more in lines of ours: what is read
    belongs to the start, the last line and the scores."""

    def reads(steps: int) -> list[str]:
        def action() -> int:
            counts: list[str] = []
            for name in READS:
                monkeypatched(name, counts)
            options = (*EVERYTHING, "log_every_images=100000", "engine.micro_batch=4")
            status = start(tmp_path / str(steps), *options, f"total_images={steps * STEP}")
            files.append_json_line(tmp_path / f"{steps}.jsonl", {"reads": sorted(counts)})
            return status

        assert ranks(action) == [0]
        return files.read_json_lines(tmp_path / f"{steps}.jsonl")[0]["reads"]

    few, many = reads(5), reads(15)
    assert few == many and few


def monkeypatched(name: str, counts: list[str]) -> None:
    """In this process, which ends, note every call of a tensor's method by a line of ours."""
    honest = getattr(torch.Tensor, name)

    def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        ours = "/latentddae/" in frame.f_code.co_filename
        if ours and threading.current_thread() is threading.main_thread():
            counts.append(f"{name} at {frame.f_code.co_filename}:{frame.f_lineno}")
        return honest(self, *args, **kwargs)

    setattr(torch.Tensor, name, counted)
