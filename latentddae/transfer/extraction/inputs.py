"""What every transfer command opens: a checkpoint and data that fit each other."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from latentddae.core import dist
from latentddae.core.config import require
from latentddae.core.errors import ConfigError
from latentddae.core.files import state_dict_hash
from latentddae.core.outputs import Output
from latentddae.core.redaction import without_secrets
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet
from latentddae.data.subsets import SampleSet
from latentddae.models import zoo
from latentddae.models.timm_backbone import PREFIX, open_backbone
from latentddae.models.zoo import Checkpoint, CheckpointHints
from latentddae.transfer.extraction.trunk import BATCH
from latentddae.transfer.results import RESULTS_FOLDER, CheckpointInfo, DataInfo

Weights = Literal["ema", "model"]


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(CheckpointHints):
    """A network, and a folder for results."""

    checkpoint: str
    """Portable checkpoint, run folder, a file or folder of published weights or its address
    (https://HOST/FILE#sha256=HEX, hf://ORG/NAME), or a baseline: timm:NAME@FILE (or @download,
    @random)."""
    weights: Weights = "ema"
    """The averaged weights, or those of the last step."""
    out: Path
    """Folder for results."""

    @property
    def read_folders(self) -> list[Path | str]:
        """What the command reads; its results must lie elsewhere."""
        return [self.checkpoint]

    def outputs(self) -> list[Output]:
        """The folder for results."""
        return [Output(self.out, RESULTS_FOLDER, self.read_folders)]

    def open_checkpoint(self) -> Checkpoint:
        """The network, on this rank's GPU where there is one."""
        return open_checkpoint(self.checkpoint, self.weights, self.hints)

    def describe(self, checkpoint: Checkpoint) -> CheckpointInfo:
        """The opened checkpoint as results record it."""
        return describe_checkpoint(checkpoint, self.checkpoint, self.weights)


@dataclass(frozen=True, kw_only=True)
class TransferOptions(CheckpointOptions):
    """A network, shards that fit it, and a folder for results."""

    data: Path
    """Folder of latent shards."""
    batch: int = BATCH
    """Images read at a time; does not change the features. Forward passes have a fixed size, 128
    images for a U-Net."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("batch",))

    @property
    def read_folders(self) -> list[Path | str]:
        return [self.checkpoint, self.data]

    def describe_data(self, train: SampleSet | None, test: SampleSet | None) -> DataInfo:
        """The opened splits as results record them."""
        return DataInfo(
            name=self.data.resolve().name,
            train=None if train is None else train.fingerprints,
            test=None if test is None else test.fingerprints,
            train_split=None if train is None else train.split,
            test_split=None if test is None else test.split,
        )


def open_checkpoint(
    source: str, weights: Weights = "ema", hints: CheckpointHints | None = None
) -> Checkpoint:
    """A `zoo.Checkpoint` on this rank's GPU where there is one, ready to give features.

    `hints` is what a file of another project does not tell, see zoo.load.
    """
    device = dist.device_for(dist.world_from_environment())
    if source.startswith(PREFIX):
        if hints not in (None, CheckpointHints()):
            raise ConfigError(
                f"{source} is a backbone: it has no objective, time, heads or size to state"
            )
        return open_backbone(source, device)
    checkpoint = zoo.load(source, weights=weights, device=device, hints=hints)
    if weights == "ema" and ema_not_warmed_up(checkpoint.info):
        print(
            f"{source}: the EMA is still mostly initial weights after "
            f"{checkpoint.info['images_seen']} images; --weights model takes the last ones",
            file=sys.stderr,
        )
    return checkpoint


def ema_not_warmed_up(info: Mapping[str, Any]) -> bool:
    """Whether an average still consists mostly of initial weights: steps x (1 - decay) < 1.

    Never for an average whose half-life grows with the run.
    """
    ema = info.get("ema") or {}
    grows = ema.get("rampup") is not None or ema.get("warmup_power") is not None
    if grows or not ema.get("halflife_images"):
        return False
    return float(info["images_seen"]) * math.log(2) < ema["halflife_images"]


def open_shards(root: Path, split: str, checkpoint: Checkpoint) -> ShardSet:
    """One split of a data folder. ConfigError if the checkpoint was trained on other latents."""
    shards = ShardSet(root, split)
    check_data(checkpoint.latents, shards)
    if (change := changed_data(checkpoint.info, shards)) and dist.world_from_environment().is_main:
        print(change, file=sys.stderr)
    return shards


def changed_data(info: Mapping[str, Any], shards: ShardSet) -> str | None:
    """In words, that the split a network was trained on has been encoded again since; None if this
    is that very split, or another data set."""
    trained, now = info.get("data") or {}, shards.fingerprints
    known = {"name": shards.root.resolve().name, "split": shards.split}
    if info.get("data_set") != known or trained.get("content") == now["content"]:
        return None
    names = [name for name in now if trained.get(name) != now[name]]
    return f"{shards.root}: split {shards.split} was encoded again since training: " + ", ".join(
        f"{name} {trained.get(name)} then, {now[name]} now" for name in names
    )


def check_data(spec: LatentSpec | None, samples: SampleSet) -> None:
    """ConfigError for samples of another autoencoder, scale or shape than the network was trained
    on. A network without a spec takes images of any size."""
    if spec is None:
        if samples.spec.kind != "image" or samples.spec.channels != 3:
            raise ConfigError(
                f"{samples.root} holds latents, the network reads images: encode the source with "
                "--autoencoder none"
            )
        return
    stored = samples.spec
    if not spec.autoencoder_sha256:  # published weights name their autoencoder without its hash
        stored = replace(stored, autoencoder_sha256="")
    if stored.codec_fingerprint == spec.codec_fingerprint:
        return
    if replace(stored, size=spec.size).codec_fingerprint == spec.codec_fingerprint:
        what = "images" if spec.kind == "image" else "latents"
        raise ConfigError(
            f"resolution: {samples.root} holds {what} of {stored.size}x{stored.size}, the "
            f"checkpoint was trained on {spec.size}x{spec.size}{_other_resolution(spec, samples)}, "
            f"or --input-size {stored.size} spreads the network's positions over them"
        )
    raise ConfigError(
        f"{samples.root} holds {_contents(samples.spec)}, the checkpoint was trained on "
        f"{_contents(spec)}: encode the source with its --autoencoder, {spec.autoencoder}"
    )


def _contents(spec: LatentSpec) -> str:
    """What samples are, by autoencoder, shape and scale."""
    codec = f"codec {spec.codec_fingerprint}"
    if spec.kind == "image":
        return f"images {spec.shape} ({codec})"
    factor = f"scaling factor {spec.scaling_factor:g}"
    return f"latents of {spec.autoencoder} {spec.shape} ({factor}, {codec})"


def _other_resolution(spec: LatentSpec, samples: SampleSet) -> str:
    """How to encode a set for a network of another size, where its manifest tells."""
    if not isinstance(samples, ShardSet):
        return ""
    resolution = samples.manifest["pipeline"].get("resolution")
    if not isinstance(resolution, int):
        return "; encode it at the checkpoint's resolution"
    wanted = resolution * spec.size // samples.spec.size
    return f"; it was encoded with --resolution {resolution}, encode it with --resolution {wanted}"


def describe_checkpoint(
    checkpoint: Checkpoint, source: str, weights: str = "ema"
) -> CheckpointInfo:
    """Which network, with which of its weights, as results record it."""
    return CheckpointInfo(
        source=without_secrets(source),
        weights=checkpoint.info.get("weights", weights),
        model_hash=state_dict_hash(checkpoint.model.state_dict())[:16],
        images_seen=checkpoint.info.get("images_seen"),
    )
