"""Networks: the Diffusion Transformer, its block taps, its named sizes, portable checkpoints.

`from latentddae.models import zoo` works without an import here: zoo needs `diffusion` and `data`,
which themselves need the networks.
"""

from latentddae.models.dit import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig"]
