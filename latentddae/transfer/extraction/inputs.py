"""What every transfer command is given: a checkpoint and a data folder that fit each other, and a
result file."""

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from latentddae import __version__
from latentddae.core import dist
from latentddae.core.errors import UsageError
from latentddae.core.files import append_json_line, read_json_lines, text_hash
from latentddae.data.shards import ShardSet
from latentddae.diffusion.levels import level_of_log_snr, level_of_ratio
from latentddae.models import zoo
from latentddae.models.timm_backbone import PREFIX, open_backbone
from latentddae.training.deepspeed_config import resolve_precision
from latentddae.transfer.extraction.extract import check_data, check_level
from latentddae.transfer.probes.metrics import ProbeResult
from latentddae.transfer.protocol.splits import HOLDOUT

RESULTS = "results.jsonl"
LEVEL_UNITS = ("s", "t", "sigma_over_alpha", "log_snr")
FROM_UNIT: dict[str, Callable[[Any, float], float]] = {
    "s": lambda objective, value: value,
    "t": lambda objective, value: objective.to_level(value),
    "sigma_over_alpha": lambda objective, value: level_of_ratio(value),
    "log_snr": lambda objective, value: level_of_log_snr(value),
}
ALIASES = {"": "s", "sigma": "sigma_over_alpha", "logsnr": "log_snr"}
LEVEL_HELP = "noise level: s in [0, 1], or t=121, sigma_over_alpha=0.4, log_snr=1.5"
CHECKPOINT_HELP = "portable checkpoint folder, or a control: timm:NAME@FILE (or @download, @random)"


def add_arguments(parser: argparse.ArgumentParser, *, holdout: bool = True) -> None:
    """The options that all transfer commands share; `holdout` for those that choose something."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--data", required=True, type=Path, help="folder of latent shards")
    parser.add_argument("--out", required=True, type=Path, help="folder for results")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--seed", type=int, help="of noise, held-out part and subset (default 0)")
    if holdout:
        parser.add_argument(
            "--holdout",
            type=float,
            help=f"share of train kept for every choice (default {HOLDOUT})",
        )
    parser.add_argument("--limit", type=int, help="use at most this many training samples")
    parser.add_argument("--batch", type=int, default=128, help="does not change the features")


def settings_of(args: argparse.Namespace, grid: dict[str, Any]) -> dict[str, Any]:
    """Seed and held-out share as given, else as the grid that chose the cell had them, else the
    defaults. The limit is a command's own: a search may be cheaper than what it is for."""
    defaults = {"seed": 0, "holdout": HOLDOUT}
    given = {name: getattr(args, name) for name in defaults}
    chosen = {
        name: grid.get(name, default) if given[name] is None else given[name]
        for name, default in defaults.items()
    }
    return {**chosen, "limit": args.limit}


def open_checkpoint(source: str, weights: Literal["ema", "model"] = "ema") -> Any:
    """A `zoo.Checkpoint` on this rank's GPU where there is one, ready to give features."""
    device = dist.device_for(dist.world_from_environment())
    if source.startswith(PREFIX):
        return open_backbone(source, device)
    checkpoint = zoo.load(source, weights=weights, device=device)
    if weights == "ema" and is_young(checkpoint.info):
        print(
            f"{source}: the average is still mostly initial weights after "
            f"{checkpoint.info['images_seen']} images; --weights model takes the raw ones",
            file=sys.stderr,
        )
    return checkpoint


def is_young(info: dict[str, Any]) -> bool:
    """Whether a weight average has forgotten less than one part in e of its start: steps x (1 -
    decay) < 1. Averages that ramp up are never young."""
    ema = info.get("ema") or {}
    if ema.get("rampup") is not None or not ema.get("halflife_images"):
        return False
    return float(info["images_seen"]) * math.log(2) < ema["halflife_images"]


def open_shards(root: Path, split: str, checkpoint: Any) -> ShardSet:
    """One split of a data folder, refused if the checkpoint was trained on other latents."""
    shards = ShardSet(root, split)
    check_data(checkpoint.latents, shards)
    return shards


def model_hash(model: torch.nn.Module) -> str:
    """A short hash of every named weight: the identity of a network wherever it came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def describe_checkpoint(checkpoint: Any, source: str, weights: str = "ema") -> dict[str, Any]:
    """Which network, with which weights: what a result line says about it."""
    info = checkpoint.info
    return {
        "source": source,
        "weights": info.get("weights", weights),  # of a control: its file, download or random
        "model_hash": model_hash(checkpoint.model),
        "images_seen": info.get("images_seen"),
    }


def precision_of(checkpoint: Any) -> str:
    """What features of this network are computed in where nobody says otherwise: bf16 or fp32."""
    return resolve_precision("auto", next(checkpoint.model.parameters()).device)


def level_of(text: str, objective: Any) -> float:
    """A noise level s from "0.2" or "s=0.2", "t=121" (the objective's timestep),
    "sigma_over_alpha=0.4" (or sigma=) or "log_snr=1.5" (or logsnr=)."""
    unit, _, number = text.strip().rpartition("=")
    unit = ALIASES.get(unit, unit)
    try:
        value = float(number)
        level = float(FROM_UNIT[unit](objective, value))
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"noise level {text!r}: expected s in [0, 1], or {', '.join(f'{u}=' for u in FROM_UNIT)} "
            "with a number"
        ) from error
    if unit == "t" and not math.isclose(
        objective.to_time(level), value, rel_tol=1e-6, abs_tol=1e-6
    ):
        if value == 0:
            return 0.0  # clean, also where the objective's timesteps begin at 1
        raise UsageError(f"noise level {text!r}: the objective has no timestep there")
    return check_level(level)


def levels_of(text: str, objective: Any) -> tuple[float, ...]:
    """Several noise levels, separated by commas; each in its own unit."""
    return tuple(level_of(part, objective) for part in numbers(text, str, "--levels"))


def describe_level(objective: Any, level: float) -> dict[str, float | None]:
    """One noise level in all units: s, the objective's own t, sigma/alpha and log-SNR (None where
    infinite)."""
    inside = 0 < level < 1
    return {
        "s": level,
        "t": float(objective.to_time(level)),
        "sigma_over_alpha": level / (1 - level) if level < 1 else None,
        "log_snr": 2 * math.log((1 - level) / level) if inside else None,
    }


def as_row(result: ProbeResult) -> dict[str, Any]:
    """A probe's result as JSON-able data, without arrays and the counts that the line gives as
    n_seen."""
    row = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return {
        key: value
        for key, value in row.items()
        if not key.startswith("n_") and not isinstance(value, np.ndarray)
    }


def record(out: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Append a result line once: a rerun that gives the same row adds nothing. Returns the line
    with its id."""
    line = json.loads(json.dumps({"id": text_hash(row), **row, "version": __version__}))
    path = out / RESULTS
    if all(old.get("id") != line["id"] for old in read_json_lines(path)):
        append_json_line(path, line)
    return line


def numbers(text: str, kind: type, name: str) -> tuple[Any, ...]:
    """A comma-separated list from the command line."""
    try:
        values = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"{name}: expected numbers separated by commas, got {text!r}") from error
    if not values:
        raise UsageError(f"{name}: the list is empty")
    return values
