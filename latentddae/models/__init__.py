"""Networks: the Diffusion Transformer, its block taps, its named sizes, portable checkpoints.

`zoo` is imported by whoever asks for it, not here: it needs `diffusion` and `data`, which themselves
need the networks.
"""

from latentddae.models.dit import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig"]
