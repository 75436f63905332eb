"""What fine-tuning trains and scores: a classifier, its samples, and the noise of its inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latentddae.core import dist, rng
from latentddae.core.config import option, require
from latentddae.core.errors import ConfigError
from latentddae.core.precision import DTYPES, resolve_precision
from latentddae.data.loader import Batch, Loader
from latentddae.data.subsets import SampleSet, Subset
from latentddae.data.training_data import DataConfig
from latentddae.models import zoo
from latentddae.models.trunks import null_labels
from latentddae.models.zoo import Checkpoint, CheckpointHints
from latentddae.training.config import RunConfig, contract
from latentddae.training.job import Evaluation, Job
from latentddae.training.process import RunContext
from latentddae.training.state_reader import StateReader
from latentddae.training.states import State
from latentddae.transfer.extraction.extract import clean_latents, keyed_noise, network_input
from latentddae.transfer.extraction.inputs import Weights, describe_checkpoint
from latentddae.transfer.extraction.spec import check_blocks, check_level
from latentddae.transfer.extraction.trunk import timestep
from latentddae.transfer.finetuning.classifier import (
    Classifier,
    NormName,
    drop_path,
    layer_decay,
)
from latentddae.transfer.finetuning.mixup import (
    MixConfig,
    mix_of,
    mixed_images,
    mixed_targets,
    smoothed,
)
from latentddae.transfer.protocol.options import OverlapOption, open_test, open_train
from latentddae.transfer.protocol.splits import Split, split_train

EVALUATION_BATCH = 256
STATE_KINDS = {"model": "master", "ema": "ema"}
"""Which weights -> the name of their pieces in a state."""
MAY_CHANGE = ("checkpoint", "eval_every_images")
"""Settings that may change between two starts, beside those of training/config.py."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig, CheckpointHints, OverlapOption):
    """Fine-tune a pretrained trunk, cut at a block, with a linear head.

    The same command again continues the run; test is scored once, at the end.
    """

    run: str = option(alias="out")
    """Run folder. The same command again continues the run in it."""
    checkpoint: str
    """Portable checkpoint, or the run folder that holds it."""
    weights: Weights = "ema"
    """The averaged weights, or those of the last step."""
    from_scratch: bool = False
    """Start from fresh weights in the checkpoint's architecture: the untrained control."""
    data: DataConfig
    test_split: str | None = None
    """Split to score, once. Default: test, else val."""
    block: int
    """The last block of the trunk, 1 to depth."""
    level: float = 0.01
    """Noise level s whose timestep the network is given (l-DAE's t = 10 of 1000 is about 0.04 in a
    DDPM)."""
    noisy_input: bool = False
    """Whether the latents have that noise."""
    norm: NormName = "layer"
    """Of the pooled features: LayerNorm without or with (affine) weights, or none."""
    layer_decay: float = 1.0
    """Learning-rate factor from each layer to the one before."""
    drop_path: float = 0.0
    """Fraction of samples that skip a branch of the last block; earlier blocks fewer."""
    mix: MixConfig = field(default_factory=MixConfig)
    holdout: float = 0.04
    """Fraction of train that is held out to choose the reported weights."""
    limit: int | None = None
    """Use at most this many training samples, chosen by key."""
    eval_every_images: int = 0
    """How often the held-out part is scored, in images seen; 0: only at the end."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        CheckpointHints.__post_init__(self)
        check_level(self.level)
        require(
            self, positive=("limit",), non_negative=("eval_every_images",), fraction=("holdout",)
        )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}")


class Opened(NamedTuple):
    """The checkpoint and the data of a run."""

    checkpoint: Checkpoint
    train: SampleSet
    test: SampleSet
    split: Split


def open_inputs(config: FinetuneConfig, device: torch.device) -> Opened:
    """Everything the settings name, checked against each other; every sample has a label."""
    checkpoint = zoo.load(config.checkpoint, config.weights, device, config.hints)
    check_blocks([config.block], checkpoint.model.config.depth)
    null_labels(checkpoint.model, 1)  # refuses a network that has none
    if config.drop_path and not checkpoint.model.branches:
        raise ConfigError(f"a {checkpoint.model.config.kind} has no drop path: drop_path=0")
    if config.data.stream:
        raise ConfigError("fine-tuning reads samples at random: not possible with data.stream")
    root = Path(config.data.path)
    train = open_train(root, (config.data.split,), checkpoint)
    test = open_test(
        root, config.test_split, checkpoint, (config.data.split,), config.allow_overlap
    )
    split = split_train(train, holdout=config.holdout, seed=config.seed, limit=config.limit)
    return Opened(checkpoint, train, test, split)


class Task:
    """The job of the training loop, and its scores."""

    def __init__(self, config: FinetuneConfig, context: RunContext) -> None:
        self.config, self.context = config, context
        opened = dist.on_all_ranks(lambda: open_inputs(config, context.device))
        self.checkpoint, self.train, self.test = opened.checkpoint, opened.train, opened.test
        self.checkpoint_info = describe_checkpoint(
            self.checkpoint, config.checkpoint, config.weights
        )
        split = opened.split
        self.fit, self.heldout = split.fit, split.train[split.heldout]
        self.classes = len(self.train.classes)
        objective, device = self.checkpoint.objective, context.device
        t = timestep(objective, config.level, device)
        self.network_t = objective.network_input(torch.zeros(1, 1, 1, 1, device=device), t)[1]
        self.classifier = self.new_classifier()

    def new_classifier(self) -> Classifier:
        """A classifier with the weights that the run starts from."""
        config = self.config
        trunk = zoo.build(self.checkpoint.model.config, seed=config.seed)
        if not config.from_scratch:
            trunk.load_state_dict(self.checkpoint.model.state_dict())
        classifier = Classifier(trunk, config.block, self.classes, config.norm, config.seed)
        return classifier.to(self.context.device)

    def job(self) -> Job:
        """What the training loop takes."""
        config, world = self.config, self.context.world
        samples = Subset(self.train, self.fit)
        fixed = contract(config, self.train)
        return Job(
            config=config,
            contract={
                **{key: value for key, value in fixed.items() if key not in MAY_CHANGE},
                "model_hash": self.checkpoint_info.model_hash,
            },
            info={"classes": list(self.train.classes)},
            model=self.classifier,
            samples=samples,
            data=config.data,
            lr_scale=layer_decay(config.layer_decay, self.classifier.trunk),
            tensors=with_partners(samples, config, world) if config.mix.active else unpaired,
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
        """Cross-entropy and noise level of every sample: (N,), (N,) float32.

        Stored moments (N, *stored_shape), labels (N,) and positions (N,); mixing takes those of a
        partner as well, and how (see `with_partners`).
        """
        config = self.config
        x0, target = self.draw(moments, label, position)
        if partner:
            *stored, rows = partner
            partner_x0, partner_target = self.draw(*stored)
            x0 = mixed_images(x0, partner_x0, rows)
            target = mixed_targets(target, partner_target, rows)
        noise = x0
        if config.noisy_input:
            noise = rng.normal(config.seed, "finetune/noise", position, x0.shape[1:])
        scales = drop_path(config.drop_path, config.block, config.seed, position)
        logits = self.logits(self.classifier, x0, noise, scales)
        loss = F.cross_entropy(logits, target, reduction="none")
        return loss, torch.full_like(loss, config.level)

    def draw(self, moments: Tensor, label: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """A posterior draw (N, C, h, w) and a smoothed target (N, classes) of stored samples."""
        noise = rng.normal(self.config.seed, "posterior", position, self.train.spec.shape)
        target = smoothed(label, self.classes, self.config.mix.smoothing)
        return self.checkpoint.latent_spec.sample(moments, noise), target

    def logits(
        self, classifier: Classifier, x0: Tensor, noise: Tensor, scales: Tensor | None = None
    ) -> Tensor:
        """Logits of clean latents and noise (N, C, h, w): (N, classes) float32."""
        config, objective = self.config, self.checkpoint.objective
        x = network_input(objective, x0, noise, config.level, config.noisy_input)
        return classifier(x, self.network_t.expand(len(x)), scales)

    def heldout_accuracies(self, state: State) -> dict[str, float]:
        """Held-out accuracy of the last weights of a state and of their average. A collective."""
        return {
            f"heldout_accuracy_{name}": self.accuracy(state, name, self.train, self.heldout)
            for name in STATE_KINDS
        }

    def accuracy(
        self, state: State, weights: str, samples: SampleSet, indices: np.ndarray
    ) -> float:
        """Accuracy of a state's weights on samples `indices` (N,), shared among the ranks. A
        collective."""
        classifier = self.classifier_of(state, weights)
        rank_indices = indices[self.context.world.rank :: self.context.world.size]
        correct = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for start in range(0, len(rank_indices), EVALUATION_BATCH):
            index = rank_indices[start : start + EVALUATION_BATCH]
            labels = torch.from_numpy(samples.labels[index]).to(self.context.device)
            correct += (self.predict(classifier, samples, index) == labels).sum()
        return float(dist.sum_tensor(correct)) / len(indices)

    @torch.inference_mode()
    def predict(self, classifier: Classifier, samples: SampleSet, index: np.ndarray) -> Tensor:
        """Classes of samples, from posterior means of the original view: (N,) int64."""
        x0 = clean_latents(self.checkpoint.latent_spec, samples, index).to(self.context.device)
        noise = x0
        if self.config.noisy_input:
            positions = rng.key_positions(samples.keys(index)).to(self.context.device)
            noise = keyed_noise(self.config.seed, 0, positions, x0.shape[1:])
        return self.logits(classifier, x0, noise).argmax(dim=1)

    def classifier_of(self, state: State, weights: str) -> Classifier:
        """A new classifier with the weights of a state, in the precision of training."""
        classifier, reader = self.new_classifier(), StateReader(state)
        tensors = dict(reader.tensors(STATE_KINDS[weights]))
        classifier.load_state_dict({**classifier.state_dict(), **tensors})
        precision = resolve_precision(self.config.engine.precision, self.context.device)
        return classifier.to(DTYPES[precision]).eval()


def unpaired(batch: Batch) -> tuple[Tensor, ...]:
    """What `Task.loss` takes without mixing: stored moments (N, *stored_shape), labels (N,),
    positions (N,)."""
    return batch.moments, batch.label, batch.position


def with_partners(
    samples: SampleSet, config: FinetuneConfig, world: dist.World
) -> Callable[[Batch], tuple[Tensor, ...]]:
    """What `Task.loss` takes with mixing: also the partner of each sample, which is the one at the
    mirrored position of the global batch, whichever rank has it, and the rows of the batch's mix.

    All of it is made on the host, page-locked where the batch is, so that nothing waits for a GPU.
    """
    mirror = Loader(
        samples,
        global_batch=config.global_batch,
        seed=config.seed,
        workers=0,
        rank=world.size - 1 - world.rank,
        world=world.size,
        group_shards=config.data.group_shards,
    )

    def tensors(batch: Batch) -> tuple[Tensor, ...]:
        mirrored = batch if world.size == 1 else mirror.batch_at(batch.start)
        number = batch.start // config.global_batch
        mix = mix_of(config.mix, config.seed, number, *samples.spec.shape[1:])
        partner = *(tensor.flip(0) for tensor in unpaired(mirrored)), mix.rows(len(batch.label))
        if batch.label.is_pinned():
            partner = tuple(tensor.pin_memory() for tensor in partner)
        return *unpaired(batch), *partner

    return tensors
