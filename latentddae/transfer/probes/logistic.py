"""Linear probe: multinomial logistic regression on frozen features.

Features are standardised with train statistics. L-BFGS runs over the whole training set until it
converges, so the result is the optimum of a convex problem and depends on no learning rate, batch
size or number of epochs. The L2 penalty is chosen on the held-out part of train, the winner is
fitted again on all of train, and the test set is scored once. Agrees with scikit-learn's
LogisticRegression.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentddae.transfer.probes.data import Device, ProbeData, ProbeResult, check_features
from latentddae.transfer.probes.few_shot import MIN_FOR_HELDOUT
from latentddae.transfer.probes.standardise import standard_scale, standardise

PROTOCOL = "lbfgs-linear/1"
L2_GRID = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
"""L2 penalties, strongest first: the loss is mean cross-entropy + l2 / 2 * |weight|^2.

scikit-learn's C is 1 / (n l2).
"""
PATIENCE = 3
"""Penalties in a row without a better held-out accuracy, after which weaker ones are not tried."""
FEW_SHOT_L2 = 0.1
"""The penalty where there are too few samples to hold one of each class out."""
MAX_ITERATIONS = 200
CHUNK = 1024  # rows per product: a chunk and its logits fit a cache
GPU_CHUNK = 65536  # on other devices than a CPU: enough work for one kernel
TOLERANCE = 1e-4
"""Largest gradient entry at which a fit ends, in coordinates where the curvature is about one."""


@dataclass(frozen=True, kw_only=True)
class LinearResult(ProbeResult):
    """The result of a linear probe."""

    l2: float
    """The penalty that was chosen."""
    l2_tried: tuple[float, ...]
    """Those tried, strongest first."""


@dataclass(frozen=True)
class Choice:
    """What the held-out part of train decided."""

    l2: float
    heldout_accuracy: float | None
    l2_tried: tuple[float, ...]
    """Strongest first."""
    heldout_accuracies: tuple[float, ...]
    """One per penalty tried."""
    model: "Softmax"
    """Fitted without the held-out part; zero where there is none."""


def probe(
    data: ProbeData, *, l2_grid: Sequence[float] = L2_GRID, device: Device = "cpu"
) -> LinearResult:
    """Choose the L2 penalty on held-out train, fit all of train, score test once.

    With a single penalty there may be no held-out sample. `device` holds a float32 copy of the
    training features and computes; see cost.linear_cost.
    """
    if len(l2_grid) > 1:
        data.require_heldout()
    mean, scale = standard_scale(data.train_x)
    x, y, n_fit = fit_rows_first(data.train_x, data.train_y, data.heldout, mean, scale)
    x, y = x.to(device), y.to(device)
    curvature = second_moment(x)
    start = Softmax.zero(x.shape[1], data.classes, device)
    choice = (
        choose(x, y, n_fit, data.classes, l2_grid, curvature)
        if data.heldout.any()
        else Choice(l2_grid[0], None, tuple(l2_grid), (), start)
    )
    model = fit(x, y, choice.l2, start=choice.model, curvature=curvature)
    predictions = predict(model, standardise(data.test_x, mean, scale).to(device)).cpu().numpy()
    return LinearResult(
        **data.scored(predictions),
        heldout_accuracy=choice.heldout_accuracy,
        heldout_accuracies=choice.heldout_accuracies,
        l2=choice.l2,
        l2_tried=choice.l2_tried,
    )


def score_heldout(
    x: np.ndarray,
    y: np.ndarray,
    heldout: np.ndarray,
    classes: int,
    l2_grid: Sequence[float] = L2_GRID,
    *,
    device: Device = "cpu",
) -> Choice:
    """The part of `probe` before test: how well features score on held-out train.

    x (N, D) float, y (N,) int64, heldout (N,) bool with at least one sample of either kind.
    """
    check_features(x, y, heldout, classes)
    x_first, y_first, n_fit = fit_rows_first(x, y, heldout, *standard_scale(x))
    x_first, y_first = x_first.to(device), y_first.to(device)
    return choose(x_first, y_first, n_fit, classes, l2_grid, second_moment(x_first))


def few_shot_grid(per_class: int) -> tuple[float, ...]:
    """The penalties for `per_class` samples per class: chosen among all on held-out samples, or
    FEW_SHOT_L2 where there are too few to hold any out."""
    return L2_GRID if per_class >= MIN_FOR_HELDOUT else (FEW_SHOT_L2,)


def fit_rows_first(
    x: np.ndarray, y: np.ndarray, heldout: np.ndarray, mean: np.ndarray, scale: np.ndarray
) -> tuple[Tensor, Tensor, int]:
    """Standardised rows (N, D) float32 and labels (N,) with the held-out ones last, and how many
    come before them: both parts are then views of one array.

    x (N, D), y (N,), heldout (N,) bool, mean and scale (D,).
    """
    rows = np.concatenate([np.flatnonzero(~heldout), np.flatnonzero(heldout)])
    labels = torch.from_numpy(y[rows].astype(np.int64))
    return standardise(x, mean, scale, rows), labels, int((~heldout).sum())


def choose(
    x: Tensor,
    y: Tensor,
    n_fit: int,
    classes: int,
    l2_grid: Sequence[float],
    curvature: Tensor,
) -> Choice:
    """Fit on the first `n_fit` rows from the strongest penalty to the weakest, each starting from
    the last, and keep the one with the best accuracy on the other rows; ties go to the strongest.

    x (N, D) float32, y (N,) int64, curvature (D, D).
    """
    path = sorted(l2_grid, reverse=True)
    fitted: list[Softmax] = []
    scores: list[float] = []
    best = 0
    model = Softmax.zero(x.shape[1], classes, x.device)
    for number, l2 in enumerate(path):
        model = fit(x[:n_fit], y[:n_fit], l2, start=model, curvature=curvature)
        fitted.append(model)
        scores.append(accuracy(model, x[n_fit:], y[n_fit:]))
        best = number if scores[number] > scores[best] else best
        if number - best >= PATIENCE:
            break
    return Choice(
        l2=path[best],
        heldout_accuracy=scores[best],
        l2_tried=tuple(path[: len(scores)]),
        heldout_accuracies=tuple(scores),
        model=fitted[best],
    )


@dataclass(frozen=True)
class Softmax:
    """A linear classifier: logits are x @ weight + bias; weight (D, C), bias (C,), float32."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def zero(cls, width: int, classes: int, device: Device = "cpu") -> "Softmax":
        """All weights (width, classes) and biases (classes,) zero."""
        return cls(torch.zeros(width, classes, device=device), torch.zeros(classes, device=device))


def predict(model: Softmax, x: Tensor) -> Tensor:
    """The class with the largest logit: (N, D) -> (N,) int64."""
    return (x @ model.weight + model.bias).argmax(dim=1)


def accuracy(model: Softmax, x: Tensor, y: Tensor) -> float:
    """Fraction of rows of x (N, D) whose largest logit is that of their label in y (N,)."""
    return (predict(model, x) == y).double().mean().item()


def second_moment(x: Tensor) -> Tensor:
    """x'x / N: (N, D) -> (D, D) float32."""
    return (x.T @ x) / len(x)


def fit(x: Tensor, y: Tensor, l2: float, *, start: Softmax, curvature: Tensor) -> Softmax:
    """The minimiser of mean cross-entropy + l2 / 2 |weight|^2, found by L-BFGS from `start`.

    x (N, D) float32, y (N,) int64, curvature (D, D). The search runs in the coordinates v = R' w
    with R R' = curvature / C + l2, an estimate of the Hessian at w = 0 (Boehning 1992): the optimum
    is the same, and it is reached in tens of steps instead of thousands.
    """
    classes = len(start.bias)
    factor = _factor(curvature / classes, l2)
    v = (factor.T @ start.weight).contiguous().requires_grad_()
    bias = (start.bias.clone() / classes**0.5).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [v, bias],
        max_iter=MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def weight_of() -> Tensor:
        return torch.linalg.solve_triangular(factor.T, v.detach(), upper=True)

    def closure() -> Tensor:
        weight = weight_of()
        loss, weight_gradient, bias_gradient = objective(
            x, y, weight, bias.detach() * classes**0.5, l2
        )
        gradient = torch.linalg.solve_triangular(factor, weight_gradient, upper=False)
        v.grad = gradient.contiguous()
        bias.grad = bias_gradient * classes**0.5
        return loss

    optimiser.step(closure)
    return Softmax(weight_of(), bias.detach() * classes**0.5)


def _factor(curvature: Tensor, l2: float) -> Tensor:
    """Lower Cholesky factor of curvature + l2, float32.

    It only preconditions the search: where float32 sums left a negative pivot, the diagonal is
    raised.
    """
    system = curvature.double()
    mean = system.diagonal().mean().item()
    raised = max(l2, 1e-6 * mean)
    while True:
        factor, failed = torch.linalg.cholesky_ex(
            system + raised * torch.eye(len(system), dtype=torch.float64, device=system.device)
        )
        if not failed.item():
            return factor.float()
        raised = max(10 * raised, 1e-6 * mean)


def objective(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (float64, shape ()) and its gradients for weight (D, C) and bias (C,).

    x (N, D) float32, y (N,) int64; rows are taken in chunks that fit a cache.
    """
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    chunk = CHUNK if x.device.type == "cpu" else GPU_CHUNK
    weight_gradient = l2 * weight
    bias_gradient = torch.zeros_like(bias)
    for start in range(0, len(x), chunk):
        rows, labels = x[start : start + chunk], y[start : start + chunk, None]
        log_p = (torch.addmm(bias, rows, weight)).log_softmax(dim=1)
        loss -= log_p.gather(1, labels).sum(dtype=torch.float64)
        residual = log_p.exp_().scatter_add_(1, labels, -torch.ones_like(log_p[:, :1])).div_(len(x))
        weight_gradient.addmm_(rows.T, residual)
        bias_gradient += residual.sum(dim=0)
    loss = loss / len(x) + l2 / 2 * weight.double().square().sum()
    return loss, weight_gradient, bias_gradient
