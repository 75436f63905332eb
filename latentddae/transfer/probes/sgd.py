"""Many linear heads trained at once by stochastic gradients: one batched product forward, the
softmax gradient by hand, one fused optimiser step.

Heads differ in what they read (one feature array each) or in how they learn (learning rate, weight
decay) and share order and initial weights, so each is the head that would come out alone.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentddae.core.errors import DataError
from latentddae.core.rng import normal, uniform
from latentddae.transfer.probes.recipes import Recipe

INITIAL_STD = 0.01
BATCH_NORM_EPS = 1e-6
BATCH_NORM_MOMENTUM = 0.1
LARS_TRUST = 1e-3
MOMENTUM = 0.9
SCORED = 4096  # rows scored at a time
TOGETHER = 8
"""Heads with features of their own that take a step together: 5 MB of features for 128 x 1152."""


@dataclass(frozen=True)
class Heads:
    """H linear classifiers: logits are normalised x @ weight' + bias.

    `mean` and `variance` are the running statistics of a batch norm without parameters, (1, D)
    where the heads read the same features, else (H, D); None without one.
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
        """Class of each row under each head: (N, D) or (H, N, D) -> (H, N) int64."""
        return torch.cat([self.logits(part).argmax(dim=2) for part in x.split(SCORED, -2)], dim=1)

    def accuracies(self, x: Tensor, y: Tensor) -> list[float]:
        """Share of right answers of each head; 0 for one whose weights are not finite."""
        right = (self.predict(x) == y).double().mean(dim=1)
        finite = self.weight.flatten(1).isfinite().all(dim=1)
        return torch.where(finite, right, 0.0).tolist()

    def __getitem__(self, which: slice) -> "Heads":
        """Some of these heads, as views."""
        norms = (self.mean, self.variance)
        own = [s[which] if s is not None and len(s) == len(self.weight) else s for s in norms]
        return Heads(self.weight[which], self.bias[which], *own)

    def one(self, place: int) -> "Heads":
        """A single head of these."""
        return self[place : place + 1]


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, D) or (H, N, D) times (H, C, D) plus (H, C) -> (H, N, C)."""
    if x.dim() == 3:
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
    heads, classes, width = weight.shape
    flat = torch.addmm(bias.flatten(), x, weight.reshape(-1, width).T)
    return flat.view(len(x), heads, classes).transpose(0, 1)


class Training:
    """Heads in the making. `epoch` is called `recipe.epochs` times with fresh or cached features.

    `rates` holds the learning rate and the weight decay of each head, as they are applied. `own`
    says that each head reads features of its own.
    """

    def __init__(
        self,
        recipe: Recipe,
        rates: Sequence[tuple[float, float]],
        *,
        width: int,
        classes: int,
        own: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.recipe, self.seed, self.done = recipe, seed, 0
        heads = len(rates)
        first = normal(seed, "probe/initial", torch.arange(classes), (width,)).to(dtype)
        self.weight = (INITIAL_STD * first).repeat(heads, 1, 1)
        self.bias = torch.zeros(heads, classes, dtype=dtype)
        self.mean: Tensor | None = None
        self.variance: Tensor | None = None
        if recipe.norm:
            shape = (heads if own else 1, width)
            self.mean, self.variance = (f(shape, dtype=dtype) for f in (torch.zeros, torch.ones))
        # Heads with features of their own take turns, so that a few at a time stay in the cache.
        size = min(heads, TOGETHER) if own else heads
        starts = range(0, heads, size)
        self._parts = [_Part(self.heads[i : i + size], recipe, rates[i : i + size]) for i in starts]
        self._own = own

    @property
    def heads(self) -> Heads:
        return Heads(self.weight, self.bias, self.mean, self.variance)

    def epoch(self, x: Tensor, y: Tensor) -> None:
        """One pass in an order keyed by (seed, epoch): x (N, D), or (H, N, D); y (N,) int64.

        The batch is the recipe's, or everything where there is less; a rest that fills no batch is
        left out, another one in every epoch.
        """
        count = x.shape[-2]
        batch = min(self.recipe.batch, count)
        steps = count // batch
        order = epoch_order(self.seed, self.done, count)[: steps * batch].split(batch)
        start = 0
        for part in self._parts:
            end = start + len(part.heads.weight)
            features = x[start:end] if self._own else x
            for step, rows in enumerate(order):
                passed = 0 if self.recipe.stepwise == "epoch" else step / steps
                part.step(features, y, rows, schedule(self.recipe, self.done + passed))
            start = end
        self.done += 1

    def check(self) -> None:
        """DataError if no head ended with finite weights."""
        if not self.weight.flatten(1).isfinite().all(dim=1).any():
            raise DataError("no head of the probe ended with finite weights: lower --lr")


class _Part:
    """Some heads, as views of the stacked tensors, with their optimiser."""

    def __init__(self, heads: Heads, recipe: Recipe, rates: Sequence[tuple[float, float]]) -> None:
        self.heads = heads
        self._gradients = torch.empty_like(heads.weight), torch.empty_like(heads.bias)
        self._optimiser = make_optimiser(recipe, rates, (heads.weight, heads.bias), self._gradients)
        self._rates = [group["lr"] for group in self._optimiser.param_groups]
        self._batch = heads.weight.new_empty(0)  # the rows of a step, in memory that is used again

    @torch.no_grad()
    def step(self, features: Tensor, y: Tensor, rows: Tensor, share: float) -> None:
        """One step on these rows, at a share of the learning rates."""
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
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
        self._optimiser.step()

    def _normalised(self, x: Tensor) -> Tensor:
        """The batch at mean 0 and variance 1 per feature; the running statistics follow."""
        variance, mean = torch.var_mean(x, dim=-2, correction=0, keepdim=True)
        rows = x.shape[-2]
        unbiased = variance * (rows / max(rows - 1, 1))
        for running, now in ((self.heads.mean, mean), (self.heads.variance, unbiased)):
            assert running is not None
            running.lerp_(now.reshape(running.shape), BATCH_NORM_MOMENTUM)
        return (x - mean) * (variance + BATCH_NORM_EPS).rsqrt()


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of samples in an epoch: a permutation of (count,), keyed by (seed, epoch)."""
    return uniform(seed, f"probe/order/{epoch}", torch.arange(count)).argsort(stable=True)


def schedule(recipe: Recipe, epoch: float) -> float:
    """Share of the learning rate at a point of training: linear warm-up, then cosine to zero."""
    if epoch < recipe.warmup_epochs:
        return epoch / recipe.warmup_epochs
    progress = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
    return (1 + math.cos(math.pi * progress)) / 2


def make_optimiser(
    recipe: Recipe,
    rates: Sequence[tuple[float, float]],
    tensors: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
) -> Any:
    """One optimiser whose groups are the runs of heads with equal rates, as views of the stacked
    tensors: with one rate for all heads, one fused step."""
    groups = []
    start = 0
    for (rate, decay), same in itertools.groupby(rates):
        part = slice(start, start + len(list(same)))
        start = part.stop
        parameters = [tensor[part] for tensor in tensors]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient[part]
        groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    if recipe.optimizer == "lars":
        return Lars(groups)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, fused=True)
    return torch.optim.Adam(groups, lr=0.0, fused=True)


class Lars:
    """Layer-wise adaptive rates (You et al. 2017, arXiv 1708.03888) for stacked heads.

    A head's gradient is scaled by 1e-3 |weight| / (|gradient| + decay |weight|); biases take plain
    momentum steps and no decay, as in MAE's linear probe.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self._momenta = [[torch.zeros_like(p) for p in group["params"]] for group in groups]

    def step(self) -> None:
        for group, momenta in zip(self.param_groups, self._momenta, strict=True):
            (weight, bias), (weight_momentum, bias_momentum) = group["params"], momenta
            decay = group["weight_decay"]
            size, slope = (t.flatten(1).norm(dim=1)[:, None, None] for t in (weight, weight.grad))
            usable = (size > 0) & (slope > 0)
            trust = torch.where(usable, LARS_TRUST * size / (slope + decay * size), 1.0)
            weight_momentum.mul_(MOMENTUM).add_(trust * (weight.grad + decay * weight))
            bias_momentum.mul_(MOMENTUM).add_(bias.grad)
            weight.sub_(group["lr"] * weight_momentum)
            bias.sub_(group["lr"] * bias_momentum)
