"""Networks: the Diffusion Transformer and DDAE's U-Nets, named sizes, checkpoints.

`from latentddae.models import zoo` works without an import here: zoo needs `diffusion` and `data`,
which themselves need the networks.
"""

from latentddae.models.dit import DiT
from latentddae.models.dit_config import DiTConfig
from latentddae.models.unet import UNet, UNetConfig

__all__ = ["DiT", "DiTConfig", "UNet", "UNetConfig"]
