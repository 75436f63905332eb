"""What every objective offers.

Timesteps t are in the objective's own unit, noise levels s = sigma / (alpha + sigma) on the axis
that all objectives share (levels.py). Tensors of images are (N, C, H, W), timesteps (N,).
"""

from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from latentddae.diffusion.levels import Real
from latentddae.diffusion.noise_distributions import NoiseDistribution
from latentddae.models.network import Conditioning

Model = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""A network: (x (N, C, H, W), network time (N,), condition) -> (N, C or 2C, H, W)."""


class Objective(Protocol):
    """A frozen record. x_t = alpha x0 + sigma noise; the clean end is alpha = 1, sigma = 0."""

    kind: ClassVar[str]
    ode_coordinates: ClassVar[Literal["linear", "ve"]]
    """Coordinates in which the ODE is solved: `linear`, x / (alpha + sigma) against s, or `ve`,
    x / alpha against sigma / alpha. With x0 and noise held fixed the path is a straight line in
    either."""

    @property
    def noise_distribution(self) -> NoiseDistribution:
        """How training draws noise levels."""

    @property
    def learn_sigma(self) -> bool:
        """Whether the network must have 2C output channels."""

    @property
    def level_range(self) -> tuple[float, float]:
        """The cleanest and the noisiest level that the network is trained on."""

    def to_time(self, s: Real) -> Real:
        """Noise level -> timestep: a float, or (N,) -> (N,)."""

    def to_level(self, t: Real) -> Real:
        """Timestep -> noise level: a float, or (N,) -> (N,)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes of signal and noise at timesteps t: (N,) -> (N,), (N,)."""

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Training timesteps for uniform u in (0, 1): (N,) -> (N,)."""

    def sampling_timesteps(self, steps: int) -> Tensor:
        """Timesteps at which a sampler calls the network, noisiest first, without the clean end:
        (steps,)."""

    def initial_latent(self, noise: Tensor) -> Tensor:
        """The latent that sampling starts from, for normal noise: (N, C, H, W) -> (N, C, H, W)."""

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t: (N, C, H, W), (N,), (N, C, H, W) -> (N, C, H, W)."""

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is fed for x_t at t: (N, C, H, W) and its time (N,)."""

    def loss(
        self, model: Model, x0: Tensor, condition: Conditioning, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Training loss per sample, for x0 and noise (N, C, H, W) and t (N,): (N,) float32."""

    def denoise(
        self, model: Model, x_t: Tensor, t: Tensor, condition: Conditioning = None
    ) -> Tensor:
        """The predicted x0: (N, C, H, W), (N,) -> (N, C, H, W)."""
