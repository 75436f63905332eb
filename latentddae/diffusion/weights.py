"""Loss weightings as weights of the squared x0 error, so that they mean the same for every
objective.

An error of x0_hat counts once for x0 prediction, SNR times for noise prediction, 1/s^2 times for
flow velocity: that is an objective's `base`. A weighting asks for another weight w of the same
error, so the loss is multiplied by w / base.
"""

from typing import Literal

from torch import Tensor

from latentddae.diffusion.levels import ratio_of_level

Weighting = Literal["none", "min_snr", "edm"]

MIN_SNR_GAMMA = 5.0  # Hang et al. (arXiv 2303.09556)
EDM_SIGMA_DATA = 1.0  # latents have unit scale


def x0_weight(weighting: str, s: Tensor) -> Tensor:
    """Weight of the squared x0 error at level s: (N,) -> (N,)."""
    ratio = ratio_of_level(s)
    if weighting == "min_snr":
        return (ratio**-2).clamp(max=MIN_SNR_GAMMA)
    assert weighting == "edm", weighting
    return ratio**-2 + EDM_SIGMA_DATA**-2


def relative_weight(weighting: str, s: Tensor, base: Tensor) -> Tensor:
    """The factor that turns a loss with weight `base` of the x0 error into one with the
    weighting's.
    """
    return x0_weight(weighting, s) / base
