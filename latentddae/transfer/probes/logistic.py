"""`latentddae linear`: the reported probe, a multinomial logistic regression on frozen features of
one cell.

Features are standardised with train statistics. L-BFGS runs over the whole train set until it
converges, so the result is the optimum of a convex problem and depends on no learning rate, batch
or epoch count. The L2 strength is chosen on the held-out part of train, the winner is fitted again
on all of train, and the test set is scored once. Agrees with scikit-learn's LogisticRegression.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentddae.core import dist
from latentddae.core.errors import DataError, run_command
from latentddae.transfer.probes.few_shot import ENOUGH
from latentddae.transfer.probes.metrics import ProbeResult
from latentddae.transfer.probes.recipes import LBFGS
from latentddae.transfer.protocol import session, sgd_probe

PROTOCOL = "lbfgs-linear/1"
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
"""L2 strengths, strongest first: the loss is mean cross-entropy + strength / 2 * |weight|².

scikit-learn's C is 1 / (n strength).
"""
PATIENCE = 3
"""Strengths in a row without a better held-out accuracy after which weaker ones are not tried."""
FEW_STRENGTH = 0.1
"""Where there are too few samples to hold one of each class out."""
MAX_ITERATIONS = 200
CHUNK = 1024
TOLERANCE = 1e-4
"""Largest gradient entry at which a fit ends, in coordinates where the curvature is about one."""


@dataclass(frozen=True, kw_only=True)
class LinearResult(ProbeResult):
    strength: float
    strengths: tuple[float, ...]
    """Those tried, strongest first."""


@dataclass(frozen=True)
class Choice:
    """What the held-out part of train decided."""

    strength: float
    heldout_accuracy: float | None
    strengths: tuple[float, ...]  # those tried, strongest first
    heldout_accuracies: tuple[float, ...]  # one per strength tried
    model: "Softmax"  # fitted without the held-out part; zero where there is none


def probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    heldout: np.ndarray,
    *,
    strengths: Sequence[float] = STRENGTHS,
    classes: int | None = None,
) -> LinearResult:
    """Fit and score a linear probe: x (N, D) float, y (N,) int in [0, classes), heldout (N,) bool.

    Everything is chosen on the held-out rows of train; test is used for one prediction at the end.
    With a single strength there may be no held-out row.
    """
    check_arrays(train_x, train_y, test_x, test_y, heldout, choosing=len(strengths) > 1)
    count = classes or int(max(train_y.max(), test_y.max())) + 1
    mean, scale = standard_scale(train_x)
    x, y, n_fit = fit_first(train_x, train_y, heldout, mean, scale)
    curvature = second_moment(x)
    start = Softmax.zero(x.shape[1], count)
    choice = (
        choose(x, y, n_fit, count, strengths, curvature)
        if heldout.any()
        else Choice(strengths[0], None, tuple(strengths), (), start)
    )
    model = fit(x, y, choice.strength, start=choice.model, curvature=curvature)
    predictions = predict(model, standardise(test_x, mean, scale)).numpy()
    return LinearResult(
        accuracy=float((predictions == test_y).mean()),
        heldout_accuracy=choice.heldout_accuracy,
        strength=choice.strength,
        strengths=choice.strengths,
        heldout_accuracies=choice.heldout_accuracies,
        width=train_x.shape[1],
        n_train=len(train_x),
        n_heldout=int(heldout.sum()),
        n_test=len(test_x),
        predictions=predictions,
    )


def judge(
    train_x: np.ndarray,
    train_y: np.ndarray,
    heldout: np.ndarray,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> Choice:
    """The part of `probe` that comes before test: how good the features look on held-out train."""
    x, y, n_fit = fit_first(train_x, train_y, heldout, *standard_scale(train_x))
    return choose(x, y, n_fit, classes, strengths, second_moment(x))


def fit_first(
    x: np.ndarray, y: np.ndarray, heldout: np.ndarray, mean: np.ndarray, scale: np.ndarray
) -> tuple[Tensor, Tensor, int]:
    """Standardised rows and labels, those to fit on first: both parts are then views of one
    array."""
    rows = np.concatenate([np.flatnonzero(~heldout), np.flatnonzero(heldout)])
    labels = torch.from_numpy(y[rows].astype(np.int64))
    return standardise(x, mean, scale, rows), labels, int((~heldout).sum())


def choose(
    x: Tensor,
    y: Tensor,
    n_fit: int,
    classes: int,
    strengths: Sequence[float],
    curvature: Tensor,
) -> Choice:
    """Fit on the first `n_fit` rows from the strongest penalty to the weakest, each from the last,
    and keep the one that reads the other rows best; of equals the strongest."""
    path = sorted(strengths, reverse=True)
    fitted: list[Softmax] = []
    scores: list[float] = []
    best = 0
    model = Softmax.zero(x.shape[1], classes)
    for number, strength in enumerate(path):
        model = fit(x[:n_fit], y[:n_fit], strength, start=model, curvature=curvature)
        fitted.append(model)
        scores.append(accuracy(model, x[n_fit:], y[n_fit:]))
        best = number if scores[number] > scores[best] else best
        if number - best >= PATIENCE:
            break
    return Choice(
        strength=path[best],
        heldout_accuracy=scores[best],
        strengths=tuple(path[: len(scores)]),
        heldout_accuracies=tuple(scores),
        model=fitted[best],
    )


def check_arrays(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    heldout: np.ndarray,
    choosing: bool = True,
) -> None:
    """Refuse arrays that do not fit each other, hold non-finite numbers, or lack a held-out part
    while something is to be chosen."""
    if not (len(train_x) == len(train_y) == len(heldout) and len(test_x) == len(test_y)):
        raise DataError(
            f"lengths differ: train {len(train_x)}/{len(train_y)}/{len(heldout)}, "
            f"test {len(test_x)}/{len(test_y)}"
        )
    if heldout.all() or (choosing and not heldout.any()) or not len(test_x):
        raise DataError("a probe needs samples to fit on, held-out samples and test samples")
    for name, x in (("train", train_x), ("test", test_x)):
        if not np.isfinite(x.sum(dtype=np.float64)):
            raise DataError(f"the {name} features hold NaN or infinity")


def standard_scale(x: np.ndarray, chunk: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, (D,) float64 each; constant columns get scale
    1."""
    mean = x.mean(axis=0, dtype=np.float64)
    total = np.zeros_like(mean)
    for start in range(0, len(x), chunk):
        total += ((x[start : start + chunk] - mean) ** 2).sum(axis=0)
    scale = np.sqrt(total / len(x))
    flat = scale <= 1e-6 * np.abs(mean) + np.finfo(np.float32).tiny
    return mean, np.where(flat, 1.0, scale)


def standardise(
    x: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    rows: np.ndarray | None = None,
    chunk: int = 4096,
) -> Tensor:
    """(x[rows] - mean) / scale as float32, without a float64 copy of everything."""
    rows = np.arange(len(x)) if rows is None else rows
    out = np.empty((len(rows), x.shape[1]), np.float32)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        out[start : start + chunk] = (x[part] - mean) / scale
    return torch.from_numpy(out)


@dataclass(frozen=True)
class Softmax:
    """A linear classifier: logits are x @ weight + bias; weight (D, C), bias (C,), float32."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def zero(cls, width: int, classes: int) -> "Softmax":
        return cls(torch.zeros(width, classes), torch.zeros(classes))


def predict(model: Softmax, x: Tensor) -> Tensor:
    """The class with the largest logit: (N, D) -> (N,) int64."""
    return (x @ model.weight + model.bias).argmax(dim=1)


def accuracy(model: Softmax, x: Tensor, y: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return (predict(model, x) == y).double().mean().item()


def second_moment(x: Tensor) -> Tensor:
    """x'x / n: (N, D) -> (D, D) float32."""
    return (x.T @ x) / len(x)


def fit(x: Tensor, y: Tensor, strength: float, *, start: Softmax, curvature: Tensor) -> Softmax:
    """The minimiser of mean cross-entropy + strength / 2 |weight|², found by L-BFGS from `start`.

    The search runs in the coordinates v = R' w with R R' = curvature / C + strength, an estimate
    of the Hessian at w = 0 (Böhning 1992): the optimum is the same, and it is reached in tens of
    steps instead of thousands.
    """
    classes = len(start.bias)
    factor = _factor(curvature / classes, strength)
    v = (factor.T @ start.weight).contiguous().requires_grad_()
    bias = (start.bias.clone() / classes**0.5).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [v, bias], max_iter=MAX_ITERATIONS, history_size=20, tolerance_grad=TOLERANCE,
        tolerance_change=1e-9, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def weight_of() -> Tensor:
        return torch.linalg.solve_triangular(factor.T, v.detach(), upper=True)

    def closure() -> Tensor:
        weight = weight_of()
        loss, weight_gradient, bias_gradient = objective(
            x, y, weight, bias.detach() * classes**0.5, strength
        )
        gradient = torch.linalg.solve_triangular(factor, weight_gradient, upper=False)
        v.grad = gradient.contiguous()
        bias.grad = bias_gradient * classes**0.5
        return loss

    optimiser.step(closure)
    return Softmax(weight_of(), bias.detach() * classes**0.5)


def _factor(curvature: Tensor, strength: float) -> Tensor:
    """Lower Cholesky factor of curvature + strength, float32.

    It only steers the search: where float32 sums left a negative pivot the diagonal is raised.
    """
    system = curvature.double()
    mean = system.diagonal().mean().item()
    raised = max(strength, 1e-6 * mean)
    while True:
        factor, failed = torch.linalg.cholesky_ex(
            system + raised * torch.eye(len(system), dtype=torch.float64)
        )
        if not failed.item():
            return factor.float()
        raised = max(10 * raised, 1e-6 * mean)


def objective(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, strength: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (float64 scalar) and its gradients for weight (D, C) and bias (C,), rows taken in
    chunks that fit a cache."""
    loss = torch.zeros((), dtype=torch.float64)
    weight_gradient = strength * weight
    bias_gradient = torch.zeros_like(bias)
    for start in range(0, len(x), CHUNK):
        rows, labels = x[start : start + CHUNK], y[start : start + CHUNK, None]
        log_p = (torch.addmm(bias, rows, weight)).log_softmax(dim=1)
        loss -= log_p.gather(1, labels).sum(dtype=torch.float64)
        residual = log_p.exp_().scatter_add_(1, labels, -torch.ones_like(log_p[:, :1])).div_(len(x))
        weight_gradient.addmm_(rows.T, residual)
        bias_gradient += residual.sum(dim=0)
    loss = loss / len(x) + strength / 2 * weight.double().square().sum()
    return loss, weight_gradient, bias_gradient


def few_options(per_class: int) -> dict[str, Any]:
    """How a probe on few samples is regularised: chosen on a fifth of them, else by FEW_STRENGTH."""
    return {"strengths": STRENGTHS if per_class >= ENOUGH else (FEW_STRENGTH,)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae linear", description="Linear probe on the features of one cell."
    )
    session.add_arguments(parser)
    session.add_few_shot(parser)
    sgd_probe.add_arguments(parser)
    args = session.parse(parser, argv)
    opened = session.open_cell(args)
    protocol = {"name": PROTOCOL}
    if args.recipe != LBFGS:
        lines = [sgd_probe.run(opened, args)]
    elif args.few_shot:
        lines = session.run_few_shot("linear", protocol, opened, probe, few_options, args)
    else:
        lines = [session.run_arrays("linear", protocol, opened, probe)]
    if dist.world_from_environment().is_main:
        print("\n".join(map(session.line_of, lines)))


if __name__ == "__main__":
    sys.exit(run_command("linear", main))
