"""Files of LightningDiT (arXiv 2501.01423): DiT's names, and those of its RMSNorm, SwiGLU and RoPE.

A training file wraps `model`, `ema`, `opt` and `config`, with names that start with `module.` or
`_orig_mod.`. All are flows to the data (time 1 is data). RoPE or qk-norm tells the heads; without
both they are those of a published width, or asked for.
"""

from collections.abc import Mapping

import torch

from latentddae.core.errors import ConfigError
from latentddae.diffusion.flow import Flow
from latentddae.models.convert import dit
from latentddae.models.convert.dit import PROJECTORS, Family, checked, checkpoint_of
from latentddae.models.convert.foreign import CheckpointHints, ForeignFile
from latentddae.models.portable import Checkpoint, Weights

OWN = {"feat_rope.freqs_cos", "blocks.0.norm1.weight", "blocks.0.mlp.w12.weight"}
"""Names of which DiT, SiT and REPA have none."""


def matches(file: ForeignFile) -> bool:
    """Whether the names are those of a DiT with options of LightningDiT."""
    has_projectors = any(name.startswith(PROJECTORS) for name in file.names)
    return dit.matches(file) and not has_projectors and bool(file.names & OWN)


def load(
    file: ForeignFile, weights: Weights, device: torch.device | str, hints: CheckpointHints
) -> Checkpoint:
    """The checkpoint of a file; see zoo.load. Raises ConfigError for another transport."""
    transport = file.arguments.get("transport")
    if isinstance(transport, Mapping):
        kind = transport.get("path_type", "Linear"), transport.get("prediction", "velocity")
        if kind != ("Linear", "velocity"):
            raise ConfigError(
                f"{file.path} was trained with path {kind[0]} and prediction {kind[1]}; only "
                "Linear and velocity can be read"
            )
    family = checked(file, hints, Family("LightningDiT", Flow(time="data")))
    return checkpoint_of(file, weights, device, hints, family)
