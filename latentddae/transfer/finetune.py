"""`latentddae finetune`: a pretrained trunk, cut at a block, trained on with a linear head.

    latentddae finetune --config configs/transfer/finetune_cifar10.yaml --checkpoint RUN --data DIR --out DIR
    deepspeed latentddae/transfer/finetune.py --config ... [--from-scratch] [key=value ...]

The network sees latents at one fixed noise level, clean by default (l-DAE). `--from-scratch` trains
fresh weights by the same recipe on the same samples: the control. It is one more job of the training
loop: the same command continues, on any number of ranks, and every draw follows from (seed, images
seen). A part of train is kept aside; what it prefers, the last weights or their average, is scored
once on test.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentddae.core import config as configuration
from latentddae.core import dist, files, rng
from latentddae.core.errors import ConfigError, run_command
from latentddae.core.precision import DTYPES, resolve_precision
from latentddae.data.loader import Batch, Loader
from latentddae.data.shards import ShardSet
from latentddae.data.subsets import SampleSet, Subset
from latentddae.data.training_data import DataConfig
from latentddae.models import zoo
from latentddae.training.config import RunConfig, add_run_arguments, contract
from latentddae.training.job import Evaluation, Job
from latentddae.training.loop import Loop
from latentddae.training.process import RunContext, distributed_run
from latentddae.training.state_reader import StateReader
from latentddae.training.states import State
from latentddae.transfer import results
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import clean_latents, keyed_noise, network_input
from latentddae.transfer.extraction.spec import check_level, describe_level
from latentddae.transfer.extraction.trunk import null_labels, timestep
from latentddae.transfer.finetuning.classifier import (
    Classifier,
    NormName,
    layer_decay,
    path_factors,
)
from latentddae.transfer.finetuning.mixup import MixConfig, mix_of, smoothed, soft_cross_entropy
from latentddae.transfer.protocol import splits
from latentddae.transfer.protocol.options import open_test
from latentddae.transfer.results import CellInfo, DataInfo, Result

PROTOCOL = "finetune/1"
EVALUATION_BATCH = 256
KINDS = {"model": "master", "ema": "ema"}  # which weights -> their kind in a state
MAY_CHANGE = ("checkpoint", "eval_every_images")  # beside training.config.SAFE_TO_CHANGE


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Everything a fine-tuning run depends on."""

    checkpoint: str
    """Portable checkpoint, or the run folder that holds it."""
    weights: Literal["ema", "model"] = "ema"
    from_scratch: bool = False
    """Fresh weights in the checkpoint's architecture: the control."""
    data: DataConfig
    test_split: str | None = None
    """None: test, else val."""
    block: int
    """The trunk ends after this one."""
    level: float = 0.01
    """Noise level s that the network is told (l-DAE's t = 10 of 1000 is about 0.04 in a DDPM)."""
    noisy_input: bool = False
    """Whether the latent really has that noise."""
    norm: NormName = "layer"
    """Of the pooled features: LayerNorm without or with (affine) weights."""
    layer_decay: float = 1.0
    """Learning-rate factor from each layer to the one before."""
    drop_path: float = 0.0
    """Share of samples that skip a branch of the last block; earlier blocks fewer."""
    mix: MixConfig = field(default_factory=MixConfig)
    holdout: float = 0.04
    """Share of train that is never trained on and chooses."""
    limit: int | None = None
    """At most this many training samples, chosen by key."""
    eval_every_images: int = 0
    """How often the held-out part is scored on the way; 0: only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_level(self.level)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}")
        if self.eval_every_images < 0:
            raise ValueError(f"eval_every_images must be 0 or more, got {self.eval_every_images}")


def finetune(config: FinetuneConfig, retry: bool = False) -> Result:
    """Run (or continue) a fine-tuning run and score test once; returns the result.

    Raises as `train.train` does.
    """
    run = Path(config.run)
    with distributed_run(run, "finetune", config.hang_timeout_s, retry) as context:
        task = Task(config, context)
        loop = Loop(task.job(), context)
        loop.run_to_end()
        context.watchdog.enter("scoring test")
        return task.result(loop.saver.newest())


class Task:
    """What is trained and scored: the classifier, its samples, its objective's noise."""

    def __init__(self, config: FinetuneConfig, context: RunContext) -> None:
        self.config, self.context = config, context
        self.checkpoint = dist.on_all_ranks(
            lambda: zoo.load(config.checkpoint, config.weights, context.device)
        )
        self.described = inputs.describe_checkpoint(
            self.checkpoint, config.checkpoint, config.weights
        )
        self.train, self.test = dist.on_all_ranks(self._open)
        split = splits.split_train(
            self.train, holdout=config.holdout, seed=config.seed, limit=config.limit
        )
        self.fit, self.heldout = split.fit, split.train[split.heldout]
        self.classes = len(self.train.classes)
        objective, device = self.checkpoint.objective, context.device
        zeros = torch.zeros(1, 1, 1, 1, device=device)
        self.network_t = objective.network_input(
            zeros, timestep(objective, config.level).to(device)
        )[1]
        self.classifier = self._classifier()

    def _open(self) -> tuple[ShardSet, ShardSet]:
        """Train and test with the same classes, every sample labelled."""
        data = self.config.data
        null_labels(self.checkpoint.model, 1)  # refuses a network that has none
        if data.stream:
            raise ConfigError("fine-tuning reads samples at random: not possible with data.stream")
        train = inputs.open_shards(Path(data.path), data.split, self.checkpoint)
        test = open_test(Path(data.path), self.config.test_split, self.checkpoint)
        if test.split == train.split:
            raise ConfigError(f"data.split and test_split are both {test.split!r}")
        for shards in (train, test):
            splits.labels_of(shards, np.arange(len(shards)))
        return train, test

    def _classifier(self) -> Classifier:
        config = self.config
        trunk = zoo.build(self.checkpoint.model.config, seed=config.seed)
        if not config.from_scratch:
            trunk.load_state_dict(self.checkpoint.model.state_dict())
        return Classifier(trunk, config.block, self.classes, config.norm, config.seed).to(
            self.context.device
        )

    def job(self) -> Job:
        """As the loop takes it."""
        config, world = self.config, self.context.world
        part = Subset(self.train, self.fit)
        fixed = contract(config, self.train)
        return Job(
            config=config,
            contract={
                **{key: value for key, value in fixed.items() if key not in MAY_CHANGE},
                "model_hash": self.described.model_hash,
            },
            info={"classes": list(self.train.classes)},
            model=self.classifier,
            samples=part,
            data=config.data,
            lr_scale=layer_decay(config.layer_decay, config.block),
            tensors=with_partners(part, config, world) if config.mix.active else plain,
            loss=self.loss,
            evaluations=(
                Evaluation(
                    event="evaluation",
                    every_images=config.eval_every_images,
                    score=self.heldout_accuracies,
                ),
            ),
        )

    def loss(
        self, moments: Tensor, label: Tensor, position: Tensor, *partner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy per sample and the noise level: (N,), (N,). Mixing takes a partner's moments,
        label and position."""
        config = self.config
        x0, target = self._drawn(moments, label, position)
        if partner:
            number = int(position[0]) // config.global_batch
            mix = mix_of(config.mix, config.seed, number, *x0.shape[2:])
            other_x0, other_target = self._drawn(*partner)
            x0, target = mix.images(x0, other_x0), mix.targets(target, other_target)
        noise = x0
        if config.noisy_input:
            noise = rng.normal(config.seed, "finetune/noise", position, x0.shape[1:])
        paths = path_factors(config.drop_path, config.block, config.seed, position)
        logits = self._logits(self.classifier, x0, noise, paths)
        return soft_cross_entropy(logits, target), torch.full_like(target[:, 0], config.level)

    def _drawn(self, moments: Tensor, label: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """A posterior draw (N, C, h, w) and a target (N, classes)."""
        spec = self.train.spec
        noise = rng.normal(self.config.seed, "posterior", position, spec.shape)
        target = smoothed(label, self.classes, self.config.mix.smoothing)
        return self.checkpoint.latent_spec.sample(moments, noise), target

    def _logits(
        self, classifier: Classifier, x0: Tensor, noise: Tensor, paths: Tensor | None = None
    ) -> Tensor:
        config, objective = self.config, self.checkpoint.objective
        x = network_input(objective, x0, noise, config.level, config.noisy_input)
        return classifier(x, self.network_t.expand(len(x)), paths)

    def heldout_accuracies(self, state: State) -> dict[str, float]:
        """Of the weights of a state and of their average, on held-out train (a collective)."""
        return {
            f"heldout_accuracy_{name}": self._accuracy(state, name, self.train, self.heldout)
            for name in KINDS
        }

    def _accuracy(self, state: State, name: str, shards: SampleSet, indices: np.ndarray) -> float:
        """Share of right answers, each rank reading its share of the samples (a collective)."""
        classifier = self._of_state(state, name)
        mine = indices[self.context.world.rank :: self.context.world.size]
        right = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for start in range(0, len(mine), EVALUATION_BATCH):
            index = mine[start : start + EVALUATION_BATCH]
            labels = torch.from_numpy(shards.labels[index]).to(self.context.device)
            right += (self.predict(classifier, shards, index) == labels).sum()
        return float(dist.sum_tensor(right)) / len(indices)

    @torch.inference_mode()
    def predict(self, classifier: Classifier, shards: SampleSet, index: np.ndarray) -> Tensor:
        """Classes of samples, from posterior means of the original view: (N,) int64."""
        x0 = clean_latents(self.checkpoint.latent_spec, shards, index).to(self.context.device)
        noise = x0
        if self.config.noisy_input:
            positions = rng.key_positions(shards.keys(index)).to(self.context.device)
            noise = keyed_noise(self.config.seed, 0, positions, x0.shape[1:])
        return self._logits(classifier, x0, noise).argmax(dim=1)

    def _of_state(self, state: State, name: str) -> Classifier:
        """A classifier of its own with the weights of a state, in the precision of training."""
        classifier, reader = self._classifier(), StateReader(state)
        weights = {**classifier.state_dict(), **dict(reader.tensors(KINDS[name]))}
        classifier.load_state_dict(weights)
        precision = resolve_precision(self.config.engine.precision, self.context.device)
        return classifier.to(DTYPES[precision]).eval()

    def result(self, state: State) -> Result:
        """Choose on held-out train, score test once, record the result (a collective)."""
        heldout = self.heldout_accuracies(state)
        chosen = max(KINDS, key=lambda name: heldout[f"heldout_accuracy_{name}"])
        accuracy = self._accuracy(state, chosen, self.test, np.arange(len(self.test)))
        result = replace(
            self.describe_result(state),
            accuracy=accuracy,
            top1=accuracy,
            heldout_accuracy=heldout[f"heldout_accuracy_{chosen}"],
            values={**heldout, "chosen": chosen, "images_per_s": _speed(self.context.run)},
        )
        return dist.on_rank0(lambda: results.append_once(self.context.run, result))

    def describe_result(self, state: State) -> Result:
        """The result before anything is scored."""
        config = self.config
        return Result(
            kind="finetune",
            checkpoint=self.described,
            protocol={"name": PROTOCOL, "from_scratch": config.from_scratch, **_recipe(config)},
            cell=CellInfo(
                **describe_level(self.checkpoint.objective, config.level),
                block=config.block,
                noisy_input=config.noisy_input,
            ),
            data=DataInfo(
                name=Path(config.data.path).resolve().name,
                train=self.train.fingerprints,
                test=self.test.fingerprints,
                train_split=self.train.split,
                test_split=self.test.split,
            ),
            seed=config.seed,
            n_seen={
                "train": len(self.fit),
                "heldout": len(self.heldout),
                "test": len(self.test),
                "images": state.images,
            },
        )


def plain(batch: Batch) -> tuple[Tensor, ...]:
    return batch.moments, batch.label, batch.position


def with_partners(
    part: SampleSet, config: FinetuneConfig, world: dist.World
) -> Callable[[Batch], tuple[Tensor, ...]]:
    """Each sample followed by the one at the mirrored place of the global batch, whatever rank has
    it."""
    mirror = Loader(
        part, global_batch=config.global_batch, seed=config.seed, workers=0,
        rank=world.size - 1 - world.rank, world=world.size, group_shards=config.data.group_shards,
    )  # fmt: skip

    def tensors(batch: Batch) -> tuple[Tensor, ...]:
        start = int(batch.position[0]) // config.global_batch * config.global_batch
        other = batch if world.size == 1 else mirror.batch_at(start)
        return *plain(batch), *(tensor.flip(0) for tensor in plain(other))

    return tensors


def _recipe(config: FinetuneConfig) -> dict[str, Any]:
    """The settings that make a result; where it ran and what is told elsewhere are left out."""
    names = (
        "weights", "norm", "layer_decay", "drop_path", "mix", "holdout", "limit",
        "optim", "ema", "total_images", "global_batch", "engine",
    )  # fmt: skip
    settings = configuration.to_dict(config)
    return {name: settings[name] for name in names}


def _speed(run: Path) -> float | None:
    """The median over a run's log lines, in images per second."""
    rows = files.read_json_lines(run / "metrics.jsonl")
    speeds = [row["images_per_s"] for row in rows if "images_per_s" in row]
    return round(float(np.median(speeds)), 1) if speeds else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae finetune", description="Train a pretrained trunk on, with a linear head."
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/transfer/")
    parser.add_argument("--checkpoint", help="portable checkpoint folder")
    parser.add_argument("--data", help="folder of latent shards")
    parser.add_argument("--out", help="run folder; the same command continues what is in it")
    parser.add_argument("--from-scratch", action="store_true", help="the control: fresh weights")
    add_run_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    given = {"checkpoint": args.checkpoint, "data.path": args.data, "run": args.out}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    overrides += ["from_scratch=true"] * args.from_scratch
    config = configuration.load(FinetuneConfig, args.config, [*overrides, *args.overrides])
    result = finetune(config, args.retry)
    if dist.world_from_environment().is_main:
        print(result_text(result))


def result_text(result: Result) -> str:
    """One line for people."""
    start = "fresh weights" if result.protocol["from_scratch"] else "pretrained weights"
    assert result.cell is not None
    return (
        f"fine-tuning from {start}: {percent(result.accuracy)} on {result.n_seen['test']} test "
        f"samples (block {result.cell.block}, {result.values['chosen']} weights, "
        f"{result.n_seen['images']:,} images; held-out {percent(result.heldout_accuracy)})"
    )


def percent(share: float | None) -> str:
    assert share is not None
    return f"{100 * share:.2f} %"


if __name__ == "__main__":
    sys.exit(run_command("finetune", main))
