"""`latentddae segment`: linear segmentation, one linear layer on the tokens of a block, in mIoU.

    DIR/train/images/NAME.jpg   DIR/train/masks/NAME.png    8-bit class ids, 255: ignored
    DIR/test/images/...         DIR/test/masks/...          DIR/classes.txt (optional)

Every pixel has the logits of its token, and the loss is the cross-entropy over pixels: a token's
target is the fraction of its pixels in each class, so no logits of image size are needed. At test
time probabilities are resized to the mask bilinearly (resized logits would let the more confident
class grow over its border). The recipe is fixed, nothing is chosen, and test is scored once.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import ConfigError, DataError, run_command, unreadable
from latentddae.core.files import open_regular, read_text, text_hash
from latentddae.core.imaging import IMAGE_ERRORS
from latentddae.data.loader import order
from latentddae.training.optimizers import OptimConfig, lr_at
from latentddae.transfer import results
from latentddae.transfer.extraction.token_maps import (
    DenseOptions,
    TokenMaps,
    image_names,
    map_file,
    open_maps,
    pixel_hash,
)
from latentddae.transfer.probes.metrics import confusion, mean_iou
from latentddae.transfer.results import DataInfo, Result, Values

PROTOCOL = "segment-linear/1"
IGNORED = 255


@dataclass(frozen=True, kw_only=True)
class SegmentTraining:
    """How the linear layer is trained."""

    steps: int = 4000
    """Optimizer steps."""
    lr: float = 3e-3
    """Learning rate of the first step; cosine to zero."""
    weight_decay: float = 1e-4
    """AdamW's."""
    batch: int = 16
    """Images per step."""

    def __post_init__(self) -> None:
        require(self, positive=("steps", "lr", "batch"), non_negative=("weight_decay",))


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(SegmentTraining, DenseOptions):
    """Linear segmentation on a block's tokens, scored in mIoU."""

    def __post_init__(self) -> None:
        SegmentTraining.__post_init__(self)
        DenseOptions.__post_init__(self)


@dataclass(frozen=True)
class SegmentationSet:
    """The images and masks of one split."""

    images: Path
    """Folder of the images."""
    names: list[str]
    masks: list[np.ndarray]
    """(H, W) uint8 each, in the order of `names`."""

    @classmethod
    def open(cls, folder: Path) -> "SegmentationSet":
        """Images below `folder`/images and masks of the same names below `folder`/masks."""
        names = image_names(folder / "images")
        masks = [read_mask(folder / "masks" / f"{Path(name).stem}.png") for name in names]
        return cls(folder / "images", names, masks)


def check_disjoint(train: SegmentationSet, test: SegmentationSet) -> None:
    """ConfigError if test holds pictures that train holds, too, under whatever names."""
    known = {pixel_hash(train.images / name): name for name in train.names}
    hashes = {name: pixel_hash(test.images / name) for name in test.names}
    shared = [name for name in test.names if hashes[name] in known]
    if shared:
        raise ConfigError(
            f"{len(shared)} of {len(test.names)} images of {test.images} are in train, too, e.g. "
            f"{shared[0]} is {known[hashes[shared[0]]]}: their score would say nothing; remove "
            f"them, or say --allow-overlap"
        )


def read_mask(path: Path) -> np.ndarray:
    """Class ids (H, W) uint8. DataError for anything but one 8-bit channel (grey or palette)."""
    try:
        with open_regular(path) as file, Image.open(file) as image:
            mask = np.array(image)
    except (OSError, *IMAGE_ERRORS) as error:
        raise unreadable(f"cannot read mask {path}: {error}", error) from error
    if mask.ndim != 2 or mask.dtype not in (np.uint8, np.bool_):
        raise DataError(f"{path}: a mask has one 8-bit channel, this is {mask.dtype} {mask.shape}")
    return mask.astype(np.uint8)


def class_count(data: Path, masks: Sequence[np.ndarray]) -> int:
    """Lines of classes.txt, else the largest id in the masks (H, W) plus one."""
    listed = data / "classes.txt"
    if listed.is_file():
        return len(read_text(listed, "class names").splitlines())
    return 1 + max(int(mask[mask != IGNORED].max(initial=0)) for mask in masks)


def check_ids(folder: Path, masks: Sequence[np.ndarray], classes: int) -> None:
    """DataError for masks (H, W) with an id that is not one of the classes."""
    ids = np.unique(np.concatenate([np.unique(mask) for mask in masks]))
    bad = [int(i) for i in ids if classes <= i != IGNORED]
    if bad:
        raise DataError(f"{folder}: ids {bad[:5]} are not of the {classes} classes of train")


def token_class_fractions(mask: np.ndarray, side: int, classes: int) -> np.ndarray:
    """The fraction of each token's pixels in each class: (H, W) -> (side, side, classes) float32.

    Sums to 1 over classes, less where pixels are ignored.
    """
    rows, columns = (np.arange(length) * side // length for length in mask.shape)
    token = rows[:, None] * side + columns[None]
    pixels = np.bincount(token.ravel(), minlength=side * side)
    valid = mask != IGNORED
    flat = token[valid] * classes + mask[valid]
    counts = np.bincount(flat, minlength=side * side * classes).reshape(side * side, classes)
    return (counts / np.maximum(pixels, 1)[:, None]).reshape(side, side, classes).astype(np.float32)


def fit(
    tokens: np.ndarray, fractions: np.ndarray, training: SegmentTraining, seed: int = 0
) -> nn.Linear:
    """A linear layer trained on standardised tokens, with the standardisation folded in.

    tokens (N, side, side, D) of any float dtype, fractions (N, side, side, classes) float32.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])  # a view: the tokens may be memory-mapped
    mean = torch.from_numpy(flat.mean(axis=0, dtype=np.float64)).float()
    scale = torch.from_numpy(flat.std(axis=0, dtype=np.float64)).float().clamp(min=1e-6)
    layer = nn.Linear(len(mean), fractions.shape[-1])
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    adam = torch.optim.AdamW(layer.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    optim = OptimConfig(lr=training.lr, schedule="cosine")
    for step, rows in enumerate(_batches(len(tokens), training, seed)):
        x = (torch.from_numpy(tokens[rows].astype(np.float32)) - mean) / scale
        target = torch.from_numpy(fractions[rows])
        loss = -(target * layer(x).log_softmax(dim=-1)).sum() / target.sum().clamp(min=1)
        for group in adam.param_groups:
            group["lr"] = lr_at(optim, step, training.steps)
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        layer.weight.div_(scale)
        layer.bias.sub_(layer.weight @ mean)
    return layer


def _batches(length: int, training: SegmentTraining, seed: int) -> Iterator[np.ndarray]:
    """Rows of each step, epoch after epoch in a new order; ascending, for memory-mapped reads."""
    endless = chain.from_iterable(order(seed, epoch, length) for epoch in count())
    for _ in range(training.steps):
        yield np.sort(np.fromiter(islice(endless, min(training.batch, length)), np.int64))


@torch.no_grad()
def predict(layer: nn.Linear, tokens: Tensor, height: int, width: int) -> np.ndarray:
    """Class ids of one map: (side, side, D) -> (height, width) int64."""
    probabilities = rearrange(layer(tokens).softmax(dim=-1), "h w c -> 1 c h w")
    full = F.interpolate(probabilities, (height, width), mode="bilinear", align_corners=False)
    return full[0].argmax(dim=0).numpy()


def score(layer: nn.Linear, tokens: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Confusion of all valid pixels, class (row) by prediction: maps (N, side, side, D), masks
    (H, W) -> (C, C) int64."""
    classes = layer.out_features
    table = np.zeros((classes, classes), np.int64)
    for token_map, mask in zip(tokens, masks, strict=True):
        predicted = predict(layer, torch.from_numpy(token_map.astype(np.float32)), *mask.shape)
        valid = mask != IGNORED
        table += confusion(predicted[valid], mask[valid].astype(np.int64), classes)
    return table


class Opened(NamedTuple):
    """What the command works on."""

    maps: TokenMaps
    train: SegmentationSet
    test: SegmentationSet
    classes: int


def open_inputs(config: SegmentConfig) -> Opened:
    """The token maps and both splits. DataError for masks that do not fit each other."""
    maps = open_maps(config)
    train, test = (SegmentationSet.open(config.data / split) for split in ("train", "test"))
    if not config.allow_overlap:
        check_disjoint(train, test)
    classes = class_count(config.data, train.masks)
    for split, part in (("train", train), ("test", test)):
        check_ids(config.data / split / "masks", part.masks, classes)
    return Opened(maps, train, test, classes)


def measure(opened: Opened, out: Path, training: SegmentTraining) -> Values:
    """Fit on train and score test; token maps lie in a temporary folder below `out` meanwhile."""
    maps, train, test, classes = opened
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".tokens-") as folder:
        train_x, test_x = (
            map_file(Path(folder) / name, maps, part.images, part.names)
            for name, part in (("train", train), ("test", test))
        )
        fractions = [token_class_fractions(mask, maps.side, classes) for mask in train.masks]
        layer = fit(train_x, np.stack(fractions), training, maps.seed)
        table = score(layer, test_x, test.masks)
    miou, iou = mean_iou(table)
    return {"miou": miou, "iou": iou, "pixel_accuracy": float(np.trace(table) / table.sum())}


def describe_result(opened: Opened, config: SegmentConfig) -> Result:
    """The result before it is measured."""
    training = {name: getattr(config, name) for name in SegmentTraining.__dataclass_fields__}
    return Result(
        kind="segment",
        checkpoint=config.describe(opened.maps.checkpoint),
        protocol={"name": PROTOCOL, **training},
        cell=opened.maps.cell_info,
        data=DataInfo(
            name=config.data.resolve().name,
            train={"names": text_hash(opened.train.names)},
            test={"names": text_hash(opened.test.names)},
            train_split="train",
            test_split="test",
        ),
        seed=config.seed,
        n_seen={"train": len(opened.train.names), "test": len(opened.test.names)},
    )


def segment(config: SegmentConfig) -> None:
    """Train, score, append the result and print it."""
    opened = open_inputs(config)
    draft = describe_result(opened, config)
    result = results.find(config.out, draft.key)
    if result is None:
        values = measure(opened, config.out, config)
        result = results.append_once(config.out, replace(draft, values=values))
    miou, accuracy = (results.number(result.values, name) for name in ("miou", "pixel_accuracy"))
    print(
        f"linear segmentation: mIoU {100 * miou:.2f} %, pixels {100 * accuracy:.2f} % on "
        f"{result.n_seen['test']} test images (block {config.block}, s={opened.maps.level:g})"
    )


def plan(config: SegmentConfig) -> str:
    """What `segment` would train."""
    opened = open_inputs(config)
    return (
        f"block {config.block} at s={opened.maps.level:g}: {config.steps} steps on "
        f"{len(opened.train.names)} images, {opened.classes} classes; "
        f"{len(opened.test.names)} test images -> {config.out}"
    )


COMMAND = Command("segment", SegmentConfig, run=segment, plan=plan, outputs=SegmentConfig.outputs)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(run_command("segment", main))
