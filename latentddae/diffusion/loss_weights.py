"""Loss weightings by noise level, as weights of the squared x0 error.

The squared error of another prediction is the squared x0 error times a factor: SNR for noise,
1 / s^2 for flow velocity. Objectives divide their loss by this factor and multiply it by the chosen
weight, so a weighting means the same for every prediction.
"""

from typing import Literal

from torch import Tensor

from latentddae.diffusion.levels import ratio_of_level

Weighting = Literal["none", "min_snr", "edm"]
"""none: the objective's own; min_snr: min(SNR, 5) (arXiv 2303.09556); edm: SNR + 1 / sigma_data^2
(arXiv 2206.00364)."""

MIN_SNR_GAMMA = 5.0


def x0_weight(weighting: Weighting, s: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Weight of the squared x0 error at noise level s: (N,) -> (N,)."""
    snr = ratio_of_level(s) ** -2
    if weighting == "min_snr":
        return snr.clamp(max=MIN_SNR_GAMMA)
    assert weighting == "edm", weighting
    return snr + sigma_data**-2
