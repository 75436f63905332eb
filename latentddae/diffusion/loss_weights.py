"""Loss weightings as weights of the squared x0 error, so that they mean the same everywhere.

An error of x0_hat counts once for x0 prediction, SNR times for noise prediction, 1/s^2 times for
flow velocity: that is an objective's `base`. A weighting asks for another weight w of the same
error, so the loss is multiplied by w / base.
"""

from typing import Literal

from torch import Tensor

from latentddae.diffusion.levels import ratio_of_level

Weighting = Literal["none", "min_snr", "edm"]
"""none: the objective's own; min_snr: min(SNR, 5) (arXiv 2303.09556); edm: SNR + 1 / sigma_data^2.
"""

MIN_SNR_GAMMA = 5.0


def x0_weight(weighting: Weighting, s: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Weight of the squared x0 error at level s: (N,) -> (N,)."""
    snr = ratio_of_level(s) ** -2
    if weighting == "min_snr":
        return snr.clamp(max=MIN_SNR_GAMMA)
    assert weighting == "edm", weighting
    return snr + sigma_data**-2
