"""What samplers walk on and what they call: nodes of the path, and the guided, clipped network."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentddae.diffusion.ddpm import DDPM, Posterior
from latentddae.diffusion.guidance import Guidance, guided, map_condition
from latentddae.diffusion.objective import Model, Objective
from latentddae.diffusion.sampler_options import OdeCoordinates
from latentddae.models.network import Conditioning


@dataclass(frozen=True)
class Node:
    """One point of a sampling path."""

    timestep: float
    """In the objective's own unit; an int where its timesteps are a table."""
    alpha: float
    sigma: float

    @property
    def level(self) -> float:
        """s = sigma / (alpha + sigma)."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def ratio(self) -> float:
        """sigma / alpha; alpha must not be 0."""
        return self.sigma / self.alpha


CLEAN = Node(math.nan, 1.0, 0.0)


def nodes_at(objective: Objective, timesteps: Tensor) -> list[Node]:
    """The nodes at timesteps (steps,), and the clean end after them."""
    alpha, sigma = objective.alpha_sigma(timesteps)
    rows = zip(timesteps.tolist(), alpha.tolist(), sigma.tolist(), strict=True)
    return [*(Node(*row) for row in rows), CLEAN]


def node_at_level(objective: Objective, level: float) -> Node:
    """The node at a noise level s."""
    timestep = torch.tensor([objective.to_time(level)], dtype=torch.float64)
    return nodes_at(objective, timestep)[0]


def predicted_noise(x: Tensor, x0: Tensor, node: Node) -> Tensor:
    """The noise in x if x0 is right: (N, C, H, W) each."""
    return (x - node.alpha * x0) / node.sigma


def coordinate(node: Node, coordinates: OdeCoordinates) -> tuple[float, float]:
    """(position, scale) of a node: s and alpha + sigma, or sigma / alpha and alpha."""
    scale = node.alpha + node.sigma if coordinates == "linear" else node.alpha
    return node.sigma / scale, scale


def slope(x: Tensor, x0: Tensor, node: Node, coordinates: OdeCoordinates) -> Tensor:
    """d(x / scale) / d(position), (N, C, H, W): the predicted noise; less x0 in linear ones."""
    noise = predicted_noise(x, x0, node)
    return noise - x0 if coordinates == "linear" else noise


class Denoiser:
    """The network as samplers see it: x at a node -> predicted x0, guided and clipped."""

    def __init__(
        self,
        objective: Objective,
        model: Model,
        condition: Conditioning = None,
        guidance: Guidance | None = None,
        clip: bool = False,
    ) -> None:
        self.objective, self.model, self.condition, self.clip = objective, model, condition, clip
        self.guidance = guidance if guidance is not None and guidance.scale != 1 else None
        self.guided_model = model if self.guidance is None else guided(model, self.guidance)

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        t, model = self._timesteps(x, node), self._model_at(node)
        x0 = self.objective.denoise(model, x, t, self.condition)
        return x0.clamp(-1, 1) if self.clip else x0

    def posterior(self, x: Tensor, node: Node, previous: Node) -> Posterior:
        """DDPM's reverse step from `node` to the cleaner node `previous`: (N, C, H, W) each."""
        assert isinstance(self.objective, DDPM)
        timestep = self.objective.first_timestep - 1 if previous is CLEAN else previous.timestep
        return self.objective.posterior(
            self._model_at(node),
            x,
            self._timesteps(x, node),
            self.condition,
            previous=torch.full((len(x),), timestep, dtype=torch.int64, device=x.device),
            clip=self.clip,
        )

    def only(self, index: int) -> "Denoiser":
        """The denoiser of one sample of the batch."""
        condition = map_condition(lambda value: value[index : index + 1], self.condition)
        return Denoiser(self.objective, self.model, condition, self.guidance, self.clip)

    def _model_at(self, node: Node) -> Model:
        """The guided model inside the interval; elsewhere, and at scale 1, one pass is enough."""
        inside = self.guidance is not None and (
            self.guidance.low <= node.level <= self.guidance.high
        )
        return self.guided_model if inside else self.model

    def _timesteps(self, x: Tensor, node: Node) -> Tensor:
        dtype = torch.int64 if isinstance(node.timestep, int) else x.dtype
        return torch.full((len(x),), node.timestep, dtype=dtype, device=x.device)
