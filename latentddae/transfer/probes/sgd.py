"""Linear heads trained by stochastic gradients, many at once: one batched product forward, the
softmax gradient by hand, one fused optimizer step.

Heads differ in what they read (one feature array each) or in how they learn (learning rate, weight
decay). They share batches and initial weights, so each is the head that training alone would give.
Where a recipe has several learning rates or weight decays, two sets of heads see every batch: one
without the held-out part of train, which chooses the best, and one on all of train, which is
reported.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from latentddae.core.errors import DataError
from latentddae.core.rng import normal, uniform
from latentddae.transfer.probes.data import Device, ProbeData, ProbeResult
from latentddae.transfer.probes.recipes import Recipe

INITIAL_STD = 0.01
BATCH_NORM_EPS = 1e-6
BATCH_NORM_MOMENTUM = 0.1
LARS_TRUST = 1e-3
MOMENTUM = 0.9
EVAL_BATCH = 4096  # rows scored at a time
HEADS_PER_GROUP = 8
"""Heads with features of their own that take a step together: 5 MB of features for 128 x 1152."""


@dataclass(frozen=True, kw_only=True)
class SgdResult(ProbeResult):
    """The result of a recipe. Rates are as applied, scaled to the batch size."""

    learning_rate: float
    """Of the reported head."""
    weight_decay: float
    """Of the reported head."""
    rates_tried: tuple[tuple[float, float], ...]
    """(learning rate, weight decay) of each head."""
    batch: int
    """Samples per step."""


@dataclass(frozen=True)
class EpochData:
    """Training features that change from epoch to epoch, and fixed ones to score on."""

    epochs: Iterable[np.ndarray]
    """Features of all training samples, (N, D) float32, one array per epoch."""
    train_y: np.ndarray
    """(N,) int64."""
    heldout: np.ndarray
    """(N,) bool."""
    heldout_x: np.ndarray | None
    """Features that the held-out samples are scored on, (H, D) float32; None: nothing to choose."""
    test_x: np.ndarray
    """(M, D) float32."""
    test_y: np.ndarray
    """(M,) int64."""
    classes: int


def probe(data: ProbeData, recipe: Recipe, *, seed: int = 0, device: Device = "cpu") -> SgdResult:
    """Train the heads of a recipe on the same features in every epoch, and score the best one."""
    choosing = len(recipe.learning_rates) * len(recipe.weight_decays) > 1
    if choosing:
        data.require_heldout()
    epochs = EpochData(
        epochs=itertools.repeat(data.train_x, recipe.epochs),
        train_y=data.train_y,
        heldout=data.heldout,
        heldout_x=data.train_x[data.heldout] if choosing else None,
        test_x=data.test_x,
        test_y=data.test_y,
        classes=data.classes,
    )
    return probe_epochs(epochs, recipe, seed=seed, device=device)


def probe_epochs(
    data: EpochData, recipe: Recipe, *, seed: int = 0, device: Device = "cpu"
) -> SgdResult:
    """Train the heads of a recipe on features of their own for each epoch, and score the best one.

    `device` holds one epoch's features at a time and computes. Raises DataError if no head ends
    with finite weights.
    """
    y, fit = (torch.from_numpy(x).to(device) for x in (data.train_y, ~data.heldout))
    shape: HeadShape = {
        "width": data.test_x.shape[1],
        "classes": data.classes,
        "like": torch.zeros((), device=device),
    }
    rates = recipe.scaled(len(y))
    reported = HeadTrainer(recipe, rates, **shape, seed=seed)
    choosing = None
    if data.heldout_x is not None:
        fit_rates = recipe.scaled(int(fit.sum()))
        choosing = HeadTrainer(recipe, fit_rates, **shape, seed=seed)
    for features in data.epochs:
        x = torch.from_numpy(features).to(device)
        reported.train_epoch(x, y)
        if choosing:
            choosing.train_epoch(x[fit], y[fit])
    reported.check()
    scores: list[float] = []
    if choosing and data.heldout_x is not None:
        choosing.check()
        scores = choosing.heads.accuracies(torch.from_numpy(data.heldout_x).to(device), y[~fit])
    best = scores.index(max(scores)) if scores else 0  # ties go to the smallest rate
    head = reported.heads.select(best)
    predictions = head.predict(torch.from_numpy(data.test_x).to(device))[0].cpu().numpy()
    return SgdResult(
        accuracy=float((predictions == data.test_y).mean()),
        heldout_accuracy=scores[best] if scores else None,
        heldout_accuracies=tuple(scores),
        learning_rate=rates[best][0],
        weight_decay=rates[best][1],
        rates_tried=tuple(rates),
        batch=min(recipe.batch, len(y)),
        width=data.test_x.shape[1],
        n_seen={"train": len(y), "heldout": int(data.heldout.sum()), "test": len(data.test_y)},
        predictions=predictions,
    )


class HeadShape(TypedDict):
    """What heads of one probe have in common."""

    width: int
    classes: int
    like: Tensor


@dataclass(frozen=True)
class Heads:
    """H linear classifiers: logits are normalised x @ weight' + bias.

    `mean` and `variance` are the running statistics of a batch norm without parameters: (1, D) if
    the heads read the same features, else (H, D); None without one.
    """

    weight: Tensor  # (H, C, D)
    bias: Tensor  # (H, C)
    mean: Tensor | None = None
    variance: Tensor | None = None

    def logits(self, x: Tensor) -> Tensor:
        """Features shared by the heads (N, D), or each head's own (H, N, D) -> (H, N, C)."""
        if self.mean is not None and self.variance is not None:
            scale = (self.variance + BATCH_NORM_EPS).rsqrt()
            moved = (x if x.dim() == 3 else x[None]) - self.mean[:, None]
            moved *= scale[:, None]
            x = moved if x.dim() == 3 else moved[0]
        return affine(x, self.weight, self.bias)

    def predict(self, x: Tensor) -> Tensor:
        """Class of each row by each head: (N, D) or (H, N, D) -> (H, N) int64."""
        parts = x.split(EVAL_BATCH, -2)
        return torch.cat([self.logits(part).argmax(dim=2) for part in parts], dim=1)

    def accuracies(self, x: Tensor, y: Tensor) -> list[float]:
        """Accuracy of each head on x (N, D) or (H, N, D), y (N,); 0 if its weights are not
        finite."""
        correct = (self.predict(x) == y).double().mean(dim=1)
        finite = self.weight.flatten(1).isfinite().all(dim=1)
        return torch.where(finite, correct, 0.0).tolist()

    def __getitem__(self, heads: slice) -> "Heads":
        """Some of the heads, as views."""
        mean, variance = (
            s[heads] if s is not None and len(s) == len(self.weight) else s
            for s in (self.mean, self.variance)
        )
        return Heads(self.weight[heads], self.bias[heads], mean, variance)

    def select(self, index: int) -> "Heads":
        """A single head."""
        return self[index : index + 1]


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, D) or (H, N, D), weight (H, C, D), bias (H, C) -> (H, N, C)."""
    if x.dim() == 3:
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
    heads, classes, width = weight.shape
    flat = torch.addmm(bias.flatten(), x, weight.reshape(-1, width).T)
    return flat.view(len(x), heads, classes).transpose(0, 1)


class HeadTrainer:
    """Trains heads: `train_epoch` is called `recipe.epochs` times.

    `rates` holds the learning rate and weight decay of each head, as applied. `separate_inputs`
    says that each head reads features of its own; `like` is a tensor (any shape) of the device and
    dtype of the heads, by default float32 on the CPU.
    """

    def __init__(
        self,
        recipe: Recipe,
        rates: Sequence[tuple[float, float]],
        *,
        width: int,
        classes: int,
        separate_inputs: bool = False,
        seed: int = 0,
        like: Tensor | None = None,
    ) -> None:
        self.recipe, self.seed, self.done = recipe, seed, 0
        heads = len(rates)
        like = torch.zeros(()) if like is None else like
        first = normal(seed, "probe/initial", torch.arange(classes), (width,)).to(like)
        self.weight = (INITIAL_STD * first).repeat(heads, 1, 1)
        self.bias = like.new_zeros(heads, classes)
        self.mean: Tensor | None = None
        self.variance: Tensor | None = None
        if recipe.norm:
            shape = (heads if separate_inputs else 1, width)
            self.mean, self.variance = like.new_zeros(shape), like.new_ones(shape)
        # Heads with features of their own take turns, so that a few at a time stay in the cache.
        size = min(heads, HEADS_PER_GROUP) if separate_inputs else heads
        self._groups = [
            _HeadGroup(self.heads[start : start + size], recipe, rates[start : start + size])
            for start in range(0, heads, size)
        ]
        self._separate_inputs = separate_inputs

    @property
    def heads(self) -> Heads:
        return Heads(self.weight, self.bias, self.mean, self.variance)

    def train_epoch(self, x: Tensor, y: Tensor) -> None:
        """One pass in an order keyed by (seed, epoch): x (N, D), or (H, N, D); y (N,) int64, both
        on the trainer's device.

        The batch is the recipe's, or all samples if they are fewer. Samples left over at the end of
        an epoch are dropped, others in every epoch.
        """
        count = x.shape[-2]
        batch = min(self.recipe.batch, count)
        steps = count // batch
        order = epoch_order(self.seed, self.done, count)[: steps * batch].to(x.device).split(batch)
        start = 0
        for group in self._groups:
            end = start + len(group.heads.weight)
            features = x[start:end] if self._separate_inputs else x
            for step, rows in enumerate(order):
                progress = 0 if self.recipe.lr_update == "epoch" else step / steps
                group.step(features, y, rows, schedule(self.recipe, self.done + progress))
            start = end
        self.done += 1

    def check(self) -> None:
        """Raise DataError if no head has finite weights."""
        if not self.weight.flatten(1).isfinite().all(dim=1).any():
            raise DataError("no head of the probe ended with finite weights: lower --lr")


class _HeadGroup:
    """Some heads, as views of the stacked tensors, with their optimizer."""

    def __init__(self, heads: Heads, recipe: Recipe, rates: Sequence[tuple[float, float]]) -> None:
        self.heads = heads
        self._gradients = torch.empty_like(heads.weight), torch.empty_like(heads.bias)
        self._optimizer = make_optimizer(recipe, rates, (heads.weight, heads.bias), self._gradients)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._batch = heads.weight.new_empty(0)  # the rows of a step, in reused memory

    @torch.no_grad()
    def step(self, features: Tensor, y: Tensor, rows: Tensor, lr_factor: float) -> None:
        """One step on these rows, with the learning rates times `lr_factor`."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * lr_factor
        x = torch.index_select(features, -2, rows, out=self._batch)
        if self.heads.mean is not None:
            x = self._normalised(x)
        residual = affine(x, self.heads.weight, self.heads.bias).softmax(dim=2)
        picked = y[rows][None, :, None].expand(len(residual), -1, 1)
        residual.scatter_add_(2, picked, torch.full_like(residual[..., :1], -1.0)).div_(len(rows))
        weight_gradient, bias_gradient = self._gradients
        if x.dim() == 3:
            torch.bmm(residual.transpose(1, 2), x, out=weight_gradient)
        else:
            flat = residual.transpose(0, 1).reshape(len(x), -1)
            torch.mm(flat.T, x, out=weight_gradient.view(-1, x.shape[1]))
        torch.sum(residual, dim=1, out=bias_gradient)
        self._optimizer.step()

    def _normalised(self, x: Tensor) -> Tensor:
        """The batch at mean 0 and variance 1 per feature; updates the running statistics."""
        variance, mean = torch.var_mean(x, dim=-2, correction=0, keepdim=True)
        rows = x.shape[-2]
        unbiased = variance * (rows / max(rows - 1, 1))
        for running, now in ((self.heads.mean, mean), (self.heads.variance, unbiased)):
            assert running is not None
            running.lerp_(now.reshape(running.shape), BATCH_NORM_MOMENTUM)
        return (x - mean) * (variance + BATCH_NORM_EPS).rsqrt()


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of samples in an epoch: a permutation (count,) int64, keyed by (seed, epoch)."""
    return uniform(seed, f"probe/order/{epoch}", torch.arange(count)).argsort(stable=True)


def schedule(recipe: Recipe, epoch: float) -> float:
    """Factor of the learning rate after `epoch` epochs: linear warm-up, then cosine to zero."""
    if epoch < recipe.warmup_epochs:
        return epoch / recipe.warmup_epochs
    progress = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
    return (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(
    recipe: Recipe,
    rates: Sequence[tuple[float, float]],
    tensors: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
) -> "torch.optim.Optimizer | Lars":
    """One optimizer for weights (H, C, D) and biases (H, C) with gradients of the same shapes.

    A parameter group is a run of heads with equal rates, as views of the stacked tensors: with one
    rate for all heads, a step is one fused call.
    """
    groups: list[dict[str, Any]] = []
    start = 0
    for (rate, decay), same in itertools.groupby(rates):
        heads = slice(start, start + len(list(same)))
        start = heads.stop
        parameters = [tensor[heads] for tensor in tensors]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient[heads]
        groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    if recipe.optimizer == "lars":
        return Lars(groups)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, fused=True)
    return torch.optim.Adam(groups, lr=0.0, fused=True)


class Lars:
    """Layer-wise adaptive rates (You et al. 2017, arXiv 1708.03888) for stacked heads.

    A head's gradient is scaled by 1e-3 |weight| / (|gradient| + decay |weight|); biases take plain
    momentum steps without decay, as in MAE's linear probe.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self._momenta = [[torch.zeros_like(p) for p in group["params"]] for group in groups]

    def step(self) -> None:
        """One update from the parameters' gradients."""
        for group, momenta in zip(self.param_groups, self._momenta, strict=True):
            (weight, bias), (weight_momentum, bias_momentum) = group["params"], momenta
            decay = group["weight_decay"]
            size, slope = (t.flatten(1).norm(dim=1)[:, None, None] for t in (weight, weight.grad))
            nonzero = (size > 0) & (slope > 0)
            trust = torch.where(nonzero, LARS_TRUST * size / (slope + decay * size), 1.0)
            weight_momentum.mul_(MOMENTUM).add_(trust * (weight.grad + decay * weight))
            bias_momentum.mul_(MOMENTUM).add_(bias.grad)
            weight.sub_(group["lr"] * weight_momentum)
            bias.sub_(group["lr"] * bias_momentum)
