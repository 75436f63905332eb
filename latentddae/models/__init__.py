"""Networks: the Diffusion Transformer, its block taps, its named sizes, portable checkpoints."""

from latentddae.models import zoo
from latentddae.models.dit import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig", "zoo"]
