"""The options of every sampler, one frozen record each; `kind` is the sampler's name."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from latentddae.core.config import require

OdeCoordinates = Literal["linear", "ve"]
LAST_NOISE_LEVEL = 0.04  # from here SiT and REPA go to the clean end without fresh noise


@dataclass(frozen=True, kw_only=True)
class EulerOptions:
    """Euler's method for the probability flow.

    With x0 and noise held fixed the path is a straight line in the objective's coordinates, so this
    is DDIM with eta 0, whatever the objective.
    """

    kind: ClassVar[str] = "euler"
    eta: ClassVar[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class DdimOptions:
    """DDIM (arXiv 2010.02502, equation 12)."""

    kind: ClassVar[str] = "ddim"

    eta: float = 0.0
    """Amount of fresh noise in [0, 1]; 1 is ancestral sampling with the small variance."""
    table: Literal["objective", "ddae"] = "objective"
    """Noise amplitudes by timestep: those of training, or the ones that DDAE's sampler reads, whose
    T + 1 betas cover the same range and whose clean end still has 1 % noise (for ddpm with the
    preset ddae)."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")


@dataclass(frozen=True, kw_only=True)
class HeunOptions:
    """Heun's second-order method (EDM, algorithms 1 and 2): 2 * steps - 1 network calls."""

    kind: ClassVar[str] = "heun"

    ode_coordinates: OdeCoordinates | None = None
    """Left out, the objective's: `ve`, EDM's own, for `edm`, else `linear`, which on a known
    mixture leaves a half to a third of the error (benchmarks/convergence.py)."""
    churn: float = 0.0
    """Noise added before the steps of a path, in total (S_churn); 0: deterministic."""
    churn_min: float = 0.0
    """Smallest ratio sigma / alpha at which noise is added."""
    churn_max: float | None = None
    """Largest ratio sigma / alpha at which noise is added; none: no limit."""
    churn_noise: float = 1.0
    """Standard deviation of the added noise, relative to the consistent one."""

    def __post_init__(self) -> None:
        require(self, non_negative=("churn", "churn_min", "churn_max", "churn_noise"))

    def adds_noise(self, alpha: float, sigma: float) -> bool:
        """Whether noise is added before a step from these amplitudes."""
        if not self.churn or not alpha or sigma / alpha < self.churn_min:
            return False
        return self.churn_max is None or sigma / alpha <= self.churn_max


@dataclass(frozen=True, kw_only=True)
class AncestralOptions:
    """DDPM's reverse process on a respaced schedule, with the objective's reverse variance."""

    kind: ClassVar[str] = "ancestral"


@dataclass(frozen=True, kw_only=True)
class EulerMaruyamaOptions:
    """Euler-Maruyama for the reverse SDE (SiT, arXiv 2401.08740, section 2.4).

    dz = (v + w/2 * noise / s) ds + sqrt(w) dW in linear coordinates, with w = `diffusion` * s.
    """

    kind: ClassVar[str] = "euler_maruyama"

    diffusion: float = 1.0
    """1 is SiT's `sigma` form; REPA uses 2."""
    last_level: float = LAST_NOISE_LEVEL
    """Levels fall evenly to here; the step from there to 0 adds no noise."""


@dataclass(frozen=True, kw_only=True)
class OdeOptions:
    """Adaptive ODE solver in linear coordinates (torchdiffeq, extra `fid`); it chooses its steps.

    Each sample is solved on its own, so that its step sizes, and its image, do not depend on what
    else is in the batch. The last 1e-4 of the path is one Euler step.
    """

    kind: ClassVar[str] = "ode"

    method: str = "dopri5"
    """One of torchdiffeq's methods."""
    rtol: float = 1e-3
    """Relative tolerance."""
    atol: float = 1e-6
    """Absolute tolerance."""


Options = (
    EulerOptions | DdimOptions | HeunOptions | AncestralOptions | EulerMaruyamaOptions | OdeOptions
)
