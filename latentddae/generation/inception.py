"""Inception features the way the field's FID wants them; the only importer of torch-fidelity.

torch-fidelity's port of the original TensorFlow graph does the work, resize to 299 included. sFID
reads ADM's spatial features: the first 7 channels of `mixed_6/conv`, which torch-fidelity calls
`Mixed_6d.branch1x1`, as (17, 17, 7) flattened in that order.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from latentddae.core.errors import ConfigError
from latentddae.core.files import sha256, state_dict_hash

ORIGINAL_WEIGHTS = "6726825d"  # how the sha256 of the original weights' file begins
SPATIAL_CHANNELS = 7
NEIGHBOURS = 3  # of precision and recall, as in ADM


@dataclass(frozen=True)
class Features:
    """Inception features of a batch of images, float32 on the CPU."""

    pooled: np.ndarray
    """(N, 2048): FID, KID, precision and recall."""
    spatial: np.ndarray
    """(N, 2023): sFID."""
    logits: np.ndarray
    """(N, 1008) without bias: inception score."""


class Inception:
    """The network. `weights` is a local file; without one torch-fidelity downloads the original."""

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ConfigError("FID needs torch-fidelity: pip install 'latentddae[fid]'") from error
        if weights is not None:
            _refuse_unsafe(weights)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=None if weights is None else str(weights),
            ).to(device)
        except OSError as error:
            raise ConfigError(
                f"Inception weights cannot be downloaded ({error}); give --inception-weights FILE"
            ) from error
        except (RuntimeError, KeyError) as error:
            raise ConfigError(f"{weights} does not hold Inception's weights: {error}") from error
        self.device = torch.device(device)
        self.file_sha256 = None if weights is None else sha256(weights)
        self.original = weights is None or sha256(weights).startswith(ORIGINAL_WEIGHTS)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    @property
    def weights_hash(self) -> str:
        """A hash over all weights, whatever file they came from."""
        return state_dict_hash(self.network.state_dict())

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """Features of images (N, H, W, 3) uint8."""
        batch = torch.from_numpy(rearrange(images, "n h w c -> n c h w").copy())
        pooled, logits = self.network(batch.to(self.device))
        assert self._spatial is not None
        spatial = rearrange(self._spatial, "n c h w -> n (h w c)")
        return Features(*(v.float().cpu().numpy() for v in (pooled, spatial, logits)))


def _refuse_unsafe(path: Path) -> None:
    """torch-fidelity unpickles the file: pass on only one that holds nothing but tensors."""
    if not path.is_file():
        raise ConfigError(f"Inception weights {path} do not exist")
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{path} is not a plain file of weights: {error}") from error


def inception_score(logits: np.ndarray, splits: int, shuffle: bool) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(E KL(p(y | x) || p(y))) (arXiv 1606.03498).

    `logits` is (N, 1008). Raises ConfigError for fewer images than splits.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    if len(logits) < splits:
        raise ConfigError(
            f"the inception score takes {splits} splits, there are {len(logits)} images"
        )
    scores = isc_features_to_metric(torch.from_numpy(logits), splits=splits, shuffle=shuffle)
    return scores["inception_score_mean"], scores["inception_score_std"]


def kernel_distance(a: np.ndarray, b: np.ndarray, subsets: int, size: int) -> tuple[float, float]:
    """KID of features (N, D) and (M, D): mean and std over subsets (arXiv 1801.01401)."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    if min(len(a), len(b)) < size:
        raise ConfigError(
            f"KID takes subsets of {size} images, there are {len(a)} and {len(b)}: --kid-subset N"
        )
    scores = kid_features_to_metric(
        torch.from_numpy(a),
        torch.from_numpy(b),
        kid_subsets=subsets,
        kid_subset_size=size,
        verbose=False,
    )
    return scores["kernel_inception_distance_mean"], scores["kernel_inception_distance_std"]


def precision_recall(samples: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Precision and recall of features (N, D) against (M, D) (arXiv 1904.06991): the fraction of
    samples near the reference, and of the reference near samples."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(samples), len(reference)) <= NEIGHBOURS:
        raise ConfigError(f"precision and recall need more than {NEIGHBOURS} images on either side")
    scores = prc_features_to_metric(
        torch.from_numpy(samples),
        torch.from_numpy(reference),
        prc_neighborhood=NEIGHBOURS,
        save_cpu_ram=True,
        verbose=False,
    )
    return scores["precision"], scores["recall"]
