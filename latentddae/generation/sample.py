"""Images out of a checkpoint: `latentddae sample --checkpoint DIR --num 64 --out DIR`.

The checkpoint says everything: objective, latent spec, autoencoder, classes. Image i depends on
(seed, i) alone, so it can be made alone (`--only i`), and a stopped run continues with the images
it lacks.

    OUT/images/000000.png ...   one file per image
    OUT/grid.png                the first 64 on one sheet
    OUT/samples.npz             with --npz: arr_0 (N, H, W, 3) uint8, for ADM's evaluator
    OUT/sample.json             every setting
    OUT/trajectory.png          with --trajectory: the predicted clean image, step by step
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from latentddae.core import dist, progress
from latentddae.core.command import Command
from latentddae.core.config import require, to_dict
from latentddae.core.errors import ConfigError, run_command
from latentddae.core.files import read_checked_json, write_checked_json, write_npy
from latentddae.core.imaging import image_sheet, read_image, write_png
from latentddae.core.outputs import FolderKind, Output, head
from latentddae.core.precision import DTYPES, resolve_precision
from latentddae.core.retry import wait_until_visible
from latentddae.data.encoding.autoencoder import Autoencoder, open_matching
from latentddae.diffusion.samplers import SAMPLERS
from latentddae.generation.adm_npz import image_files, write_npz
from latentddae.generation.generate import (
    SampleSettings,
    decode,
    generate_batches,
    labels_for,
    trajectory,
)
from latentddae.models import zoo
from latentddae.models.zoo import Checkpoint, CheckpointHints, Weights

GRID_IMAGES = 64
MAX_IMAGES = 10_000_000
SAMPLES_FOLDER = FolderKind(
    "a folder of samples",
    (
        *("sample.json", "grid.png", "trajectory.png", "samples.npz", "fid.jsonl"),
        *("images/", "latents/"),
    ),
    proof=lambda folder: (
        (folder / "sample.json").is_file() and b'"objective"' in head(folder / "sample.json")
    ),
)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SampleSettings, CheckpointHints):
    """Generate images from a checkpoint; image i depends on the seed and i alone."""

    checkpoint: str
    """Portable checkpoint, run folder, or published weights."""
    num: int
    """Number of images."""
    out: Path
    """Folder for the images; a stopped run continues in it."""
    weights: Weights = "ema"
    """Which weights of the checkpoint to use."""
    autoencoder: str | None = None
    """Where the autoencoder is now, if it moved; its hash must match."""
    batch: int = 64
    """Images per network call on each rank."""
    only: tuple[int, ...] = ()
    """Make these images alone."""
    npz: bool = False
    """Also write samples.npz for ADM's evaluator."""
    latents: bool = False
    """Also keep the latents, latents/000000.npy."""
    trajectory: bool = False
    """Also draw trajectory.png."""

    def __post_init__(self) -> None:
        SampleSettings.__post_init__(self)
        CheckpointHints.__post_init__(self)
        require(self, positive=("num", "batch"), at_most={"num": MAX_IMAGES})
        outside = [i for i in self.only if not 0 <= i < self.num]
        if outside:
            raise ValueError(f"only: image {outside[0]} is not among 0 ... {self.num - 1}")

    @property
    def indices(self) -> Sequence[int]:
        return self.only or range(self.num)


def image_path(folder: Path, index: int) -> Path:
    return folder / "images" / f"{index:06d}.png"


def latent_path(folder: Path, index: int) -> Path:
    return folder / "latents" / f"{index:06d}.npy"


def provenance(checkpoint: Checkpoint, config: SampleConfig) -> dict[str, object]:
    """All that the pixels depend on, for sample.json."""
    info, spec = checkpoint.info, checkpoint.latent_spec
    settings = to_dict(config)
    source = {k: info.get(k) for k in ("path", "weights", "sha256", "images_seen", "ema")}
    if "trained_at" in info:  # the images are of another size
        source |= {"shape": list(spec.shape), "trained_at": info["trained_at"]}
    return {
        **{field.name: settings[field.name] for field in fields(SampleSettings)},
        "checkpoint": source,
        "objective": checkpoint.objective.kind,
        "autoencoder": spec.autoencoder,
        "autoencoder_sha256": spec.autoencoder_sha256,
    }


def check_model(checkpoint: Checkpoint, config: SampleConfig) -> None:
    """Raise ConfigError for what this model cannot do, before anything is written."""
    classes = checkpoint.model.config.num_classes
    labels_for(config.labels, classes, torch.arange(1), config.seed)
    scale = config.guidance.scale
    if classes == 0 and scale != 1:
        raise ConfigError("guidance needs a model with labels; this one is unconditional")
    if scale != 1 and config.labels == "none":
        raise ConfigError("guidance needs labels; labels none leaves nothing to guide towards")
    sampler = SAMPLERS[config.sampler.kind]
    sampler.nodes(sampler.objective(checkpoint.objective, config.sampler), config)


def check_folder(config: SampleConfig, record: dict[str, object]) -> None:
    """Raise ConfigError if `out` holds other things, other settings or more images."""
    out, path = config.out, config.out / "sample.json"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no sample.json; choose another folder")
        return
    old, new = read_checked_json(path, "settings of samples"), json.loads(json.dumps(record))
    for settings in (old, new):
        settings["checkpoint"].pop("path", None)
    differing = [key for key, value in new.items() if old.get(key) != value]
    if differing:
        raise ConfigError(
            f"{out} holds samples made with other settings ({', '.join(differing)}); "
            "choose another folder"
        )
    strays = [p for p in image_files(out / "images") if not re.fullmatch(r"\d{6,}\.png", p.name)]
    if strays:
        raise ConfigError(f"{strays[0]} is none of the samples in {out}: move it away")
    if old.get("num", 0) > config.num:
        raise ConfigError(
            f"{out} already holds a run of {old['num']} images, got --num {config.num}"
        )


def missing_images(config: SampleConfig) -> list[int]:
    """Indices of the images that `out` lacks."""

    def lacks(i: int) -> bool:
        return not image_path(config.out, i).exists() or (
            config.latents and not latent_path(config.out, i).exists()
        )

    return [i for i in config.indices if lacks(i)]


def make_images(
    config: SampleConfig, checkpoint: Checkpoint, autoencoder: Autoencoder, world: dist.World
) -> None:
    """Write this rank's share of the images that `out` lacks."""
    # Rank 0 decides: another rank, a moment later, would see images that are already being made.
    missing = dist.on_rank0(lambda: missing_images(config))
    rank_indices = missing[world.rank :: world.size]
    if not rank_indices:
        return
    with progress.images(len(rank_indices), "sample", show=world.is_main) as bar:
        for indices, x0 in generate_batches(checkpoint, rank_indices, config, config.batch):
            images = decode(checkpoint, x0, autoencoder, config.batch)
            for index, image, latent in zip(indices, images, x0, strict=True):
                if config.latents:
                    write_npy(latent_path(config.out, index), latent.cpu().numpy())
                write_png(image_path(config.out, index), image)
            bar.update(len(indices))


def finish(config: SampleConfig, checkpoint: Checkpoint) -> None:
    """Once all images are there: the sheet, and ADM's file."""
    files = [image_path(config.out, i) for i in range(config.num)]
    wait_until_visible(files)
    first = np.stack([read_image(file) for file in files[:GRID_IMAGES]])
    write_png(config.out / "grid.png", image_sheet(first, columns=min(8, len(first))))
    if config.npz:
        classes = checkpoint.model.config.num_classes
        labels = labels_for(config.labels, classes, torch.arange(config.num), config.seed)
        write_npz(config.out / "samples.npz", files, None if labels is None else labels.numpy())


def open_inputs(
    config: SampleConfig, device: torch.device
) -> tuple[SampleConfig, Checkpoint, Autoencoder]:
    """The settings with a resolved precision, and what they name, checked against each other."""
    config = replace(config, precision=resolve_precision(config.precision, device))
    checkpoint = zoo.load(config.checkpoint, config.weights, device, config.hints)
    check_model(checkpoint, config)
    autoencoder = open_matching(checkpoint.latent_spec, config.autoencoder, device)
    return config, checkpoint, autoencoder


def plan(config: SampleConfig) -> str:
    """What a run would do, after the checks of a real start."""
    config, checkpoint, _ = open_inputs(config, dist.device_for(dist.World()))
    check_folder(config, provenance(checkpoint, config))
    return (
        f"{len(missing_images(config))} of {len(config.indices)} images are missing in "
        f"{config.out}/images\n{config.checkpoint}: {checkpoint.model.config.kind}, objective "
        f"{checkpoint.objective.kind}, {checkpoint.model.config.num_classes} classes\n"
        f"{config.sampler.kind}, {config.steps} steps, guidance {config.guidance.scale}, "
        f"{config.precision}"
    )


def run(config: SampleConfig) -> None:
    """Generate the images on all ranks of the launcher."""
    world = dist.start()
    given, device = config, dist.device_for(world)
    config, checkpoint, autoencoder = dist.on_all_ranks(lambda: open_inputs(given, device))
    checkpoint.model.to(DTYPES[config.precision])
    dist.on_rank0(lambda: start_folder(config, checkpoint))
    make_images(config, checkpoint, autoencoder, world)
    dist.barrier()
    if not world.is_main:
        return
    if not config.only:
        finish(config, checkpoint)
    if config.trajectory:
        write_png(config.out / "trajectory.png", trajectory(checkpoint, config, autoencoder))
    print(f"{len(image_files(config.out / 'images'))} images in {config.out}/images")


def start_folder(config: SampleConfig, checkpoint: Checkpoint) -> None:
    """Check the folder and write sample.json; warn about a guidance scale that is rarely meant."""
    scale = config.guidance.scale
    if scale < 1:
        print(
            f"warning: guidance scale {scale}: 1 means no guidance, 0 ignores the label",
            file=sys.stderr,
        )
    record = provenance(checkpoint, config)
    check_folder(config, record)
    write_checked_json(config.out / "sample.json", {**record, "num": config.num})


def outputs(config: SampleConfig) -> list[Output]:
    """The folder of samples."""
    return [Output(config.out, SAMPLES_FOLDER, [config.checkpoint])]


COMMAND = Command("sample", SampleConfig, run=run, plan=plan, outputs=outputs, on_ranks=True)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("sample", main))
