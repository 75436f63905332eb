"""Inception features the way the field's FID wants them; the only importer of torch-fidelity.

torch-fidelity's port of the original TensorFlow graph does the work, resize to 299 included. sFID
reads ADM's spatial features: the first 7 channels of `mixed_6/conv`, which torch-fidelity calls
`Mixed_6d.branch1x1`, as (17, 17, 7) flattened in that order.
"""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.core.files import sha256

ORIGINAL_WEIGHTS = "6726825d"  # how the sha256 of the original weights' file begins
SPATIAL_CHANNELS = 7
NEIGHBOURS = 3  # of precision and recall, as in ADM


@dataclass(frozen=True)
class Features:
    """Of a batch of images, float32 on the CPU."""

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
            self.network: Any = FeatureExtractorInceptionV3(
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

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    @property
    def weights_hash(self) -> str:
        """A hash over all weights, whatever file they came from."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """(N, H, W, 3) uint8 -> features."""
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        pooled, logits = self.network(batch.to(self.device))
        assert self._spatial is not None
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)
        return Features(*(v.float().cpu().numpy() for v in (pooled, spatial, logits)))


def _refuse_unsafe(path: Path) -> None:
    """torch-fidelity unpickles the file; let it see only one that holds nothing but tensors."""
    if not path.is_file():
        raise ConfigError(f"Inception weights {path} do not exist")
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{path} is not a plain file of weights: {error}") from error


def inception_score(logits: np.ndarray, splits: int, shuffle: bool) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(E KL(p(y | x) || p(y))) (arXiv 1606.03498)."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    if len(logits) < splits:
        raise ConfigError(
            f"the inception score takes {splits} splits, there are {len(logits)} images"
        )
    found = isc_features_to_metric(torch.from_numpy(logits), splits=splits, shuffle=shuffle)
    return found["inception_score_mean"], found["inception_score_std"]


def kernel_distance(a: np.ndarray, b: np.ndarray, subsets: int, size: int) -> tuple[float, float]:
    """KID, mean and standard deviation over subsets (arXiv 1801.01401)."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    if min(len(a), len(b)) < size:
        raise ConfigError(
            f"KID takes subsets of {size} images, there are {len(a)} and {len(b)}: --kid-subset N"
        )
    found = kid_features_to_metric(
        torch.from_numpy(a),
        torch.from_numpy(b),
        kid_subsets=subsets,
        kid_subset_size=size,
        verbose=False,
    )
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def precision_recall(samples: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Share of samples near the reference and of the reference near samples (arXiv 1904.06991)."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(samples), len(reference)) <= NEIGHBOURS:
        raise ConfigError(f"precision and recall need more than {NEIGHBOURS} images on either side")
    found = prc_features_to_metric(
        torch.from_numpy(samples),
        torch.from_numpy(reference),
        prc_neighborhood=NEIGHBOURS,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["precision"], found["recall"]
