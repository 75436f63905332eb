"""What every objective offers. Times t are in the objective's own unit, levels s on the common
axis.
"""

from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from latentddae.diffusion.levels import Real
from latentddae.models.network import Conditioning

Model = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""A network: (x (N, C, H, W), network time (N,), condition) -> (N, C or 2C, H, W)."""


class Objective(Protocol):
    """A frozen record. x_t = alpha x0 + sigma noise; the clean end is alpha = 1, sigma = 0."""

    kind: ClassVar[str]
    ode_coordinates: ClassVar[Literal["linear", "ve"]]
    """Coordinates in which the ODE is solved: x / (alpha + sigma) against s, or x / alpha against
    sigma / alpha. With x0 and noise held fixed the path is a straight line in either."""

    @property
    def learn_sigma(self) -> bool:
        """Whether the network must have 2C output channels."""

    @property
    def level_range(self) -> tuple[float, float]:
        """The levels the network is trained on, cleanest and noisiest."""

    def to_time(self, s: Real) -> Real:
        """Noise level -> timestep."""

    def to_level(self, t: Real) -> Real:
        """Timestep -> noise level."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The path: signal and noise amplitude at timesteps, (N,) -> (N,), (N,)."""

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Training times for uniform u in (0, 1): (N,) -> (N,)."""

    def sampling_timesteps(self, steps: int) -> Tensor:
        """Times at which a sampler calls the network: (steps,), noisiest first, without the end."""

    def initial_latent(self, noise: Tensor) -> Tensor:
        """The latent that sampling starts from, for standard normal noise."""

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t: (N, C, H, W), (N,), (N, C, H, W) -> (N, C, H, W)."""

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is fed for x_t at timesteps t."""

    def loss(
        self, model: Model, x0: Tensor, condition: Conditioning, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Training loss per sample: (N,) float32."""

    def denoise(
        self, model: Model, x_t: Tensor, t: Tensor, condition: Conditioning = None
    ) -> Tensor:
        """The clean latent the network expects behind x_t: (N, C, H, W)."""
