"""`latentddae segment`: linear segmentation, one linear layer on the tokens of a block, in mIoU.

    DIR/train/images/NAME.jpg   DIR/train/masks/NAME.png    8-bit class ids, 255: ignored
    DIR/test/images/...         DIR/test/masks/...          DIR/classes.txt (one name a line) if wanted

The loss is the cross-entropy of every pixel whose logits are its token's: a token's target is then the
mix of classes under it, and no picture-sized logits are made. For test, probabilities are resized to
the mask bilinearly (logits would let the surer class grow over its border). The recipe is fixed and
nothing is chosen; test is scored once.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core.errors import DataError, UsageError, run_command
from latentddae.core.files import text_hash
from latentddae.data.loader import order
from latentddae.training.optimizers import OptimConfig, lr_at
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.token_maps import (
    TokenMaps,
    add_arguments,
    image_names,
    map_file,
    open_maps,
)
from latentddae.transfer.probes.metrics import confusion, mean_iou

PROTOCOL = "segment-linear/1"
IGNORED = 255


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the linear layer is trained."""

    steps: int = 4000
    lr: float = 3e-3
    weight_decay: float = 1e-4
    batch: int = 16
    """Images a step."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.lr <= 0:
            raise UsageError(f"steps, batch and learning rate must be positive, got {self}")


def read_mask(path: Path) -> np.ndarray:
    """Class ids (H, W) uint8; DataError for anything but one 8-bit channel (grey or palette)."""
    try:
        with Image.open(path) as image:
            mask = np.array(image)
    except OSError as error:
        raise DataError(f"cannot read mask {path}: {error}") from error
    if mask.ndim != 2 or mask.dtype not in (np.uint8, np.bool_):
        raise DataError(f"{path}: a mask has one 8-bit channel, this is {mask.dtype} {mask.shape}")
    return mask.astype(np.uint8)


def read_masks(folder: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The mask of each image: the same name with .png."""
    return [read_mask(folder / f"{Path(name).stem}.png") for name in names]


def class_count(data: Path, masks: Sequence[np.ndarray]) -> int:
    """Lines of classes.txt, else the largest id in train plus one."""
    listed = data / "classes.txt"
    if listed.is_file():
        return len(listed.read_text().splitlines())
    ids = [int(mask[mask != IGNORED].max(initial=0)) for mask in masks]
    return max(ids) + 1


def check_ids(folder: Path, masks: Sequence[np.ndarray], classes: int) -> None:
    found = np.unique(np.concatenate([np.unique(mask) for mask in masks]))
    bad = [int(i) for i in found if classes <= i != IGNORED]
    if bad:
        raise DataError(f"{folder}: ids {bad[:5]} are not of the {classes} classes of train")


def shares_under_tokens(mask: np.ndarray, side: int, classes: int) -> np.ndarray:
    """How much of each token is of each class: (H, W) -> (side, side, classes) float32.

    Sums to 1 over classes, less where pixels are ignored.
    """
    rows, columns = (np.arange(length) * side // length for length in mask.shape)
    token = rows[:, None] * side + columns[None]
    pixels = np.bincount(token.ravel(), minlength=side * side)
    valid = mask != IGNORED
    flat = token[valid] * classes + mask[valid]
    counts = np.bincount(flat, minlength=side * side * classes).reshape(side * side, classes)
    return (counts / np.maximum(pixels, 1)[:, None]).reshape(side, side, classes).astype(np.float32)


def fit(tokens: np.ndarray, shares: np.ndarray, settings: Settings, seed: int = 0) -> nn.Linear:
    """The linear layer on standardised tokens, folded into one on tokens as they are.

    tokens (N, side, side, D) of any float dtype, shares (N, side, side, classes).
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    mean = torch.from_numpy(flat.mean(axis=0, dtype=np.float64)).float()
    scale = torch.from_numpy(flat.std(axis=0, dtype=np.float64)).float().clamp(min=1e-6)
    layer = nn.Linear(len(mean), shares.shape[-1])
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    adam = torch.optim.AdamW(layer.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    optim = OptimConfig(lr=settings.lr, schedule="cosine")
    for step, rows in enumerate(_mixed(len(tokens), settings, seed)):
        x = (torch.from_numpy(tokens[rows].astype(np.float32)) - mean) / scale
        target = torch.from_numpy(shares[rows])
        loss = -(target * layer(x).log_softmax(dim=-1)).sum() / target.sum().clamp(min=1)
        for group in adam.param_groups:
            group["lr"] = lr_at(optim, step, settings.steps)
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        layer.weight.div_(scale)
        layer.bias.sub_(layer.weight @ mean)
    return layer


def _mixed(length: int, settings: Settings, seed: int) -> Iterator[np.ndarray]:
    """Rows of each step, epoch after epoch in a new order; ascending, as a memory map likes them."""
    endless = chain.from_iterable(order(seed, epoch, length) for epoch in count())
    for _ in range(settings.steps):
        yield np.sort(np.fromiter(islice(endless, min(settings.batch, length)), np.int64))


@torch.no_grad()
def predict(layer: nn.Linear, tokens: Tensor, height: int, width: int) -> np.ndarray:
    """Class ids (height, width) of one map (side, side, D)."""
    shares = layer(tokens).softmax(dim=-1).permute(2, 0, 1)[None]
    full = F.interpolate(shares, (height, width), mode="bilinear", align_corners=False)
    return full[0].argmax(dim=0).numpy()


def score(layer: nn.Linear, tokens: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Confusion of all valid pixels, class (row) by answer: (classes, classes) int64."""
    classes = layer.out_features
    table = np.zeros((classes, classes), np.int64)
    for map_, mask in zip(tokens, masks, strict=True):
        answer = predict(layer, torch.from_numpy(map_.astype(np.float32)), *mask.shape)
        valid = mask != IGNORED
        table += confusion(answer[valid], mask[valid].astype(np.int64), classes)
    return table


def run(maps: TokenMaps, data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Fit on DIR/train, score DIR/test."""
    names = {split: image_names(data / split / "images") for split in ("train", "test")}
    masks = {split: read_masks(data / split / "masks", names[split]) for split in names}
    classes = class_count(data, masks["train"])
    for split in names:
        check_ids(data / split / "masks", masks[split], classes)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".tokens-") as folder:
        tokens = {
            split: map_file(Path(folder) / split, maps, data / split / "images", names[split])
            for split in names
        }
        shares = np.stack([shares_under_tokens(m, maps.side, classes) for m in masks["train"]])
        layer = fit(tokens["train"], shares, settings, maps.seed)
        table = score(layer, tokens["test"], masks["test"])
    miou, each = mean_iou(table)
    return {
        "data": {split: text_hash(names[split]) for split in names},
        "n_seen": {split: len(names[split]) for split in names},
        "miou": miou,
        "iou": each,
        "pixel_accuracy": float(np.trace(table) / table.sum()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae segment", description="Linear segmentation on a block's tokens, mIoU."
    )
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--lr", type=float, default=Settings.lr)
    args = parser.parse_args(argv)
    settings = Settings(steps=args.steps, lr=args.lr)
    maps = open_maps(args)
    found = run(maps, args.data, args.out, settings)
    row = {
        "kind": "segment",
        **maps.facts(args.checkpoint, args.weights),
        "protocol": {"name": PROTOCOL, **asdict(settings)},
        **found,
    }
    line = inputs.record(args.out, row)
    print(
        f"linear segmentation: mIoU {100 * line['miou']:.2f} %, pixels "
        f"{100 * line['pixel_accuracy']:.2f} % on {line['n_seen']['test']} test images "
        f"(block {args.block}, s={maps.level:g})"
    )


if __name__ == "__main__":
    sys.exit(run_command("segment", main))
