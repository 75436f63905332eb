"""Images out of a checkpoint: `latentddae sample --checkpoint DIR --num 64 --out DIR`.

The checkpoint says everything: objective, latent spec, autoencoder, classes. Noise and label of
image i come from (seed, i): the same images appear on any number of ranks and with any batch size,
image i can be made alone (`--only i`), and a stopped run continues with the images it lacks.

    OUT/images/000000.png ...   one file per image
    OUT/grid.png                the first 64 on one sheet
    OUT/samples.npz             with --npz: arr_0 (N, H, W, 3) uint8, for ADM's evaluator
    OUT/sample.json             every setting
    OUT/trajectory.png          with --trajectory: what the network believes on the way
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentddae.core import dist, rng
from latentddae.core.errors import ConfigError, UsageError, run_command
from latentddae.core.files import write_json
from latentddae.diffusion.guidance import Guidance
from latentddae.diffusion.samplers import SAMPLERS, options_of
from latentddae.generation.pictures import (
    image_files,
    read_image,
    sheet,
    to_uint8,
    write_npz,
    write_png,
)
from latentddae.models import zoo

GRID_IMAGES = 64
TRAJECTORY_IMAGES = 4
TRAJECTORY_COLUMNS = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What the pixels of image i depend on, besides the checkpoint and i."""

    sampler: str = "euler"
    steps: int = 50
    options: dict[str, Any] = field(default_factory=dict)
    """The sampler's own, e.g. {"eta": 1.0}."""
    seed: int = 0
    labels: str = "balanced"
    """balanced (i modulo classes), random, none (the null label), or a list "3,7" taken in turn."""
    guidance: Guidance = field(default_factory=Guidance)
    clip: bool = False
    """Keep the predicted clean image in [-1, 1]; for pixel models."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the network's weights."""

    def __post_init__(self) -> None:
        known = options_of(self.sampler)
        for name in self.options:
            if name not in known:
                raise ConfigError(
                    f"sampler {self.sampler} has no option {name!r}; it has: "
                    f"{', '.join(known) or 'none'}"
                )
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")


def labels_for(policy: str, num_classes: int, positions: Tensor, seed: int) -> Tensor | None:
    """Labels of the images at `positions`: (N,) int64, or None where the model has none.

    Raises ConfigError for a label the model does not know.
    """
    if num_classes == 0:
        if policy not in ("balanced", "none"):
            raise ConfigError(f"labels {policy!r}: this model is unconditional, it has no labels")
        return None
    if policy == "balanced":
        return positions % num_classes
    if policy == "random":
        u = rng.uniform(seed, "sample label", positions)
        return (u * num_classes).long().clamp(max=num_classes - 1)
    if policy == "none":
        return torch.full_like(positions, num_classes)
    try:
        listed = torch.tensor([int(part) for part in policy.split(",")])
    except ValueError:
        raise ConfigError(
            f"labels {policy!r}: expected balanced, random, none or numbers such as 3,7"
        ) from None
    if listed.min() < 0 or listed.max() >= num_classes:
        raise ConfigError(f"labels {policy}: the model knows 0 ... {num_classes - 1}")
    return listed[positions % len(listed)]


def generate(
    checkpoint: zoo.Checkpoint,
    indices: Sequence[int],
    settings: SampleConfig | None = None,
    *,
    batch: int = 64,
    callback: Any = None,
    **changes: Any,
) -> Tensor:
    """Latents at training scale of the given image indices: (len(indices), C, h, w) on the CPU.

    Settings come as a record, or as its fields: generate(checkpoint, range(64), steps=20).
    """
    settings = settings or SampleConfig(**changes)
    return torch.cat(
        [x0.cpu() for _, x0 in batches(checkpoint, indices, settings, batch, callback)]
    )


def batches(
    checkpoint: zoo.Checkpoint,
    indices: Sequence[int],
    settings: SampleConfig,
    batch: int,
    callback: Any = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (image indices, their x0 (n, C, h, w) float32) in batches."""
    if not indices:
        raise ConfigError("no image indices to sample")
    model, seed = checkpoint.model, settings.seed
    device = next(model.parameters()).device
    shape = checkpoint.latent_spec.shape
    for first in range(0, len(indices), batch):
        positions = torch.tensor(list(indices[first : first + batch]), dtype=torch.int64)
        y = labels_for(settings.labels, model.config.num_classes, positions, seed)

        def noise_sampler(step: int, positions: Tensor = positions) -> Tensor:
            return rng.normal(seed, f"sampler step {step}", positions, shape).to(device)

        x0 = SAMPLERS[settings.sampler](
            checkpoint.objective,
            model,
            rng.normal(seed, "sample noise", positions, shape).to(device),
            None if y is None else y.to(device),
            steps=settings.steps,
            guidance=settings.guidance,
            clip=settings.clip,
            noise_sampler=noise_sampler,
            callback=callback,
            **settings.options,
        )
        yield positions.tolist(), x0.float()


def decode(checkpoint: zoo.Checkpoint, x0: Tensor, autoencoder: Any, batch: int = 64) -> np.ndarray:
    """Latents at training scale to pixels: (N, C, h, w) -> (N, H, W, 3) uint8."""
    parts = (autoencoder.decode(checkpoint.latent_spec.unscale(part)) for part in x0.split(batch))
    return np.concatenate([to_uint8(images) for images in parts])


def trajectory(checkpoint: zoo.Checkpoint, settings: SampleConfig, autoencoder: Any) -> np.ndarray:
    """A sheet: one row per image, the predicted clean image from the first step to the last."""
    predictions: list[Tensor] = []
    generate(
        checkpoint,
        range(TRAJECTORY_IMAGES),
        settings,
        batch=TRAJECTORY_IMAGES,
        callback=lambda step, x0, x: predictions.append(x0.float().cpu()),
    )
    if not predictions:
        raise ConfigError(f"sampler {settings.sampler} takes steps of its own: no trajectory")
    chosen = np.linspace(0, len(predictions) - 1, min(TRAJECTORY_COLUMNS, len(predictions))).round()
    columns = [decode(checkpoint, predictions[int(i)], autoencoder) for i in chosen]
    rows = np.stack(columns, axis=1)
    return sheet(rows.reshape(-1, *rows.shape[2:]), len(columns))


def image_path(folder: Path, index: int) -> Path:
    return folder / "images" / f"{index:06d}.png"


def describe(checkpoint: zoo.Checkpoint, settings: SampleConfig) -> dict[str, Any]:
    """All that the pixels depend on, for sample.json."""
    info = checkpoint.info
    return {
        **asdict(settings),
        "checkpoint": {k: info.get(k) for k in ("path", "weights", "sha256", "images_seen", "ema")},
        "objective": checkpoint.objective.kind,
        "autoencoder": checkpoint.latent_spec.autoencoder,
        "autoencoder_sha256": checkpoint.latent_spec.autoencoder_sha256,
    }


def open_folder(out: Path, facts: dict[str, Any], num: int) -> None:
    """Start a folder of samples or check that it holds the same kind. `num` may only grow."""
    path = out / "sample.json"
    if path.exists():
        old = json.loads(path.read_text())
        plain = json.loads(json.dumps(facts))
        plain["checkpoint"].pop("path")
        old["checkpoint"].pop("path", None)
        differing = [key for key, value in plain.items() if old.get(key) != value]
        if differing:
            raise ConfigError(
                f"{out} holds samples made with other settings ({', '.join(differing)}); "
                "choose another folder"
            )
        if old.get("num", 0) > num:
            raise ConfigError(f"{out} already holds a run of {old['num']} images, got --num {num}")
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no sample.json; choose another folder")
    write_json(path, {**facts, "num": num})


def run(
    checkpoint: zoo.Checkpoint,
    settings: SampleConfig,
    out: Path,
    indices: Sequence[int],
    *,
    autoencoder: Any,
    world: dist.World,
    batch: int = 64,
    keep_latents: bool = False,
) -> int:
    """Make the images that `out` lacks, this rank's share of them; returns how many it made."""

    def lacks(i: int) -> bool:
        return not image_path(out, i).exists() or (
            keep_latents and not latent_path(out, i).exists()
        )

    # One rank looks: another, a moment later, would see images that are already being made.
    missing = dist.on_rank0(lambda: [i for i in indices if lacks(i)])
    mine = missing[world.rank :: world.size]
    if not mine:
        return 0
    (out / "images").mkdir(parents=True, exist_ok=True)
    if keep_latents:
        (out / "latents").mkdir(exist_ok=True)
    with tqdm(total=len(mine), unit="image", disable=not world.is_main) as bar:
        for numbers, x0 in batches(checkpoint, mine, settings, batch):
            images = decode(checkpoint, x0, autoencoder, batch)
            for index, image, latent in zip(numbers, images, x0, strict=True):
                if keep_latents:
                    np.save(latent_path(out, index), latent.cpu().numpy(), allow_pickle=False)
                write_png(image_path(out, index), image)
            bar.update(len(numbers))
    return len(mine)


def latent_path(folder: Path, index: int) -> Path:
    return folder / "latents" / f"{index:06d}.npy"


def finish(
    out: Path, checkpoint: zoo.Checkpoint, settings: SampleConfig, num: int, npz: bool
) -> None:
    """Once all images are there: the sheet, and ADM's file."""
    files = [image_path(out, i) for i in range(num)]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise ConfigError(f"{out} lacks {len(absent)} of {num} images, e.g. {absent[0]}")
    first = np.stack([read_image(file) for file in files[:GRID_IMAGES]])
    write_png(out / "grid.png", sheet(first, columns=min(8, len(first))))
    if npz:
        classes = checkpoint.model.config.num_classes
        labels = labels_for(settings.labels, classes, torch.arange(num), settings.seed)
        write_npz(out / "samples.npz", files, None if labels is None else labels.numpy())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="latentddae sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="portable checkpoint folder")
    add("--num", type=int, required=True, help="number of images")
    add("--out", type=Path, required=True, help="folder; a stopped run continues in it")
    add("--weights", choices=("ema", "model"), default="ema")
    add("--sampler", default="euler", help=", ".join(SAMPLERS))
    add("--steps", type=int, default=50)
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="of the sampler: eta=1")
    add("--seed", type=int, default=0)
    add("--labels", default="balanced", help="balanced, random, none, or a list such as 3,7")
    add("--cfg-scale", type=float, default=1.0, help="guidance; 1: none, one pass")
    add("--cfg-channels", type=int, help="guide the first so many channels only; DiT: 3")
    add("--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"))
    add("--allow-cfg-below-1", action="store_true")
    add("--clip", action="store_true", help="keep the predicted image in [-1, 1] (pixel models)")
    add("--dtype", choices=tuple(DTYPES), default="fp32")
    add("--batch", type=int, default=64)
    add("--only", type=int, action="append", metavar="INDEX", help="make this image alone")
    add("--npz", action="store_true", help="also write samples.npz for ADM's evaluator")
    add("--latents", action="store_true", help="also keep the latents, latents/000000.npy")
    add("--trajectory", action="store_true", help="also draw trajectory.png")
    add("--autoencoder", help="where the autoencoder is now, if it moved; its hash must match")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def option_values(items: Sequence[str]) -> dict[str, Any]:
    """["eta=1", "frame=ve"] -> {"eta": 1.0, "frame": "ve"}."""
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise UsageError(f"--option {item!r} is not of the form key=value")
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = text
    return values


def main(argv: list[str] | None = None) -> None:
    from latentddae.data.encoding.autoencoder import open_matching

    args = parse(argv)
    if args.num < 1 or args.batch < 1:
        raise UsageError(f"--num and --batch must be at least 1, got {args.num} and {args.batch}")
    outside = [i for i in args.only or () if not 0 <= i < args.num]
    if outside:
        raise UsageError(f"--only {outside[0]} is not among the {args.num} images 0 ... N-1")
    settings = SampleConfig(
        sampler=args.sampler,
        steps=args.steps,
        options=option_values(args.option),
        seed=args.seed,
        labels=args.labels,
        guidance=Guidance(
            scale=args.cfg_scale,
            channels=args.cfg_channels,
            low=args.cfg_interval[0],
            high=args.cfg_interval[1],
            allow_below_one=args.allow_cfg_below_1,
        ),
        clip=args.clip,
        dtype=args.dtype,
    )
    world = dist.start()
    try:
        device = dist.device_for(world)
        checkpoint = zoo.load(args.checkpoint, weights=args.weights, device=device)
        check(checkpoint, settings, args.num)
        checkpoint.model.to(DTYPES[args.dtype])
        autoencoder = open_matching(checkpoint.latent_spec, args.autoencoder, device)
        facts = describe(checkpoint, settings)
        dist.on_rank0(lambda: open_folder(args.out, facts, args.num))
        indices = args.only or range(args.num)
        run(
            checkpoint,
            settings,
            args.out,
            indices,
            autoencoder=autoencoder,
            world=world,
            batch=args.batch,
            keep_latents=args.latents,
        )
        dist.barrier()
        if world.is_main and not args.only:
            finish(args.out, checkpoint, settings, args.num, args.npz)
        if world.is_main and args.trajectory:
            write_png(args.out / "trajectory.png", trajectory(checkpoint, settings, autoencoder))
        if world.is_main:
            print(f"{len(image_files(args.out / 'images'))} images in {args.out}/images")
    finally:
        dist.stop()


def check(checkpoint: zoo.Checkpoint, settings: SampleConfig, num: int) -> None:
    """Refuse what this model cannot do before anything is written."""
    classes = checkpoint.model.config.num_classes
    labels_for(settings.labels, classes, torch.arange(min(num, 1)), settings.seed)
    if classes == 0 and settings.guidance.scale != 1:
        raise ConfigError("guidance needs a model with labels; this one is unconditional")
    kind = checkpoint.objective.kind
    if settings.sampler == "ancestral" and kind != "ddpm":
        raise ConfigError(f"ancestral sampling is DDPM's, the checkpoint's objective is {kind}")
    if settings.guidance.scale != 1 and settings.labels == "none":
        raise ConfigError("guidance needs labels; labels none leaves nothing to guide towards")
    checkpoint.objective.sampling_timesteps(settings.steps)


if __name__ == "__main__":
    sys.exit(run_command("sample", main))
