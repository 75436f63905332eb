"""Portable weights out of a run's resume state, whatever its number of ranks and ZeRO stage.

    latentddae export RUN [--out DIR] [--weights ema] [--precision bf16] [--state images-...]

The tensors are read, converted and written one at a time. The file holds exactly the tensors of the
model; anything else is refused.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from latentddae.core import config as configuration
from latentddae.core.command import Command
from latentddae.core.config import positional
from latentddae.core.errors import (
    ConfigError,
    DataError,
    LatentddaeError,
    UsageError,
    run_command,
)
from latentddae.core.files import warn
from latentddae.core.outputs import Output
from latentddae.core.precision import DTYPES
from latentddae.core.safetensors_stream import Entry
from latentddae.data.latents import LatentSpec
from latentddae.diffusion import OBJECTIVES
from latentddae.models import zoo
from latentddae.models.network import NetworkConfig
from latentddae.models.portable import CHECKPOINT_FOLDER
from latentddae.training import states
from latentddae.training.ema import EmaConfig
from latentddae.training.state_reader import StateReader
from latentddae.training.states import State

WEIGHTS = {"ema": ("ema",), "model": ("model",), "both": ("model", "ema")}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write portable weights out of a run's resume state: one CPU process, no DeepSpeed."""

    run: Path = positional()
    """The run folder."""
    out: Path | None = None
    """Folder of the checkpoint; none: RUN/export."""
    weights: Literal["ema", "model", "both"] = "both"
    """Which weights to write: the average, the trained ones, or both."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the trained weights; buffers and frozen weights keep theirs."""
    state: str | None = None
    """images-N, or N; none: the newest intact state."""
    halflife: int | None = None
    """Half-life in images that picks one of several averages; none: the first one."""


def run_export(config: ExportConfig) -> None:
    """Export a state of a run and say where the checkpoint is, and which state it is of.

    A run that is being trained deletes old states: one that goes while it is read is followed by
    the newest one.
    """
    out = config.out or config.run / "export"
    dtype = DTYPES[config.precision]
    while True:
        state = _find_state(config)
        try:
            folder = export(state, out, WEIGHTS[config.weights], dtype, config.halflife)
            break
        except (LatentddaeError, OSError, SafetensorError):
            if config.state is not None or state.path.exists():
                raise
            warn(f"{state.path} was deleted by its run meanwhile: taking a newer one")
    print(f"{config.weights} weights after {state.images:,} images ({state.path.name}): {folder}")


def plan(config: ExportConfig) -> str:
    """What would be exported, after checking the state; nothing is written."""
    state = _find_state(config)
    _average(configuration.build(EmaConfig, state.info["ema_config"]), config.halflife)
    out = config.out or config.run / "export"
    return f"{config.weights} weights after {state.images:,} images in {config.precision} to {out}"


def _find_state(config: ExportConfig) -> State:
    if not (config.run / "state").is_dir():
        raise ConfigError(f"{config.run} is not a run folder: it has no state/")
    return states.find(config.run / "state", _images(config.state))


def _images(name: str | None) -> int | None:
    """Images seen by a state called "images-000000012800", or by its number alone."""
    if name is None:
        return None
    try:
        return int(name.removeprefix(states.PREFIX).replace(",", ""))
    except ValueError:
        raise UsageError(f"--state takes images-N or N, got {name!r}") from None


def export(
    state: State,
    folder: Path,
    weights: Sequence[str] = WEIGHTS["both"],
    dtype: torch.dtype = torch.float32,
    halflife: int | None = None,
) -> Path:
    """Write the portable checkpoint of a state (see zoo.save) and return its folder.

    `halflife` picks one of several averages. Raises ConfigError if there is no such
    average, DataError if the state does not hold the tensors of its model, WriteError if
    the folder cannot be written.
    """
    reader, info = StateReader(state), state.info
    ema = configuration.build(EmaConfig, info["ema_config"])
    kinds = {"model": "master", "ema": _average(ema, halflife)}
    model = configuration.build_choice(zoo.REGISTRY, info["model"], "model")
    return zoo.save(
        folder,
        model=model,
        objective=configuration.build_choice(OBJECTIVES, info["objective"], "objective"),
        latents=LatentSpec.from_dict(info["latents"]),
        weights={name: _entries(reader, kinds[name], model, dtype) for name in weights},
        info={
            "classes": info["classes"],
            "images_seen": state.images,
            "ema": {
                "halflife_images": ema.halflives()[kinds["ema"]],
                "rampup": ema.rampup,
            },
            "data": info["data"],
            **({"data_set": info["data_set"]} if "data_set" in info else {}),
            "conditional": info["conditional"],
            "seed": info["contract"]["seed"],
            **({"origin": info["origin"]} if info.get("origin") else {}),
        },
    )


def _average(ema: EmaConfig, halflife: int | None) -> str:
    """The kind of the average with this half-life; None: the first one."""
    for kind, images in ema.halflives().items():
        if halflife in (None, images):
            return kind
    halflives = ", ".join(map(str, ema.halflives().values()))
    raise ConfigError(
        f"there is no average with a half-life of {halflife} images; there are: {halflives}"
    )


def _entries(
    reader: StateReader, kind: str, model_config: NetworkConfig, dtype: torch.dtype
) -> dict[str, Entry]:
    """The tensors of a model in the order of its state dict, each read when it is written.

    Trained weights are converted to `dtype`; frozen ones and buffers keep theirs.
    """
    with torch.device("meta"):
        expected = zoo.build(model_config).state_dict()
    fixed, shapes = reader.non_trainable_state(), reader.shapes
    stored = {**shapes, **{name: tuple(value.shape) for name, value in fixed.items()}}
    _compare(reader.state, stored, {name: tuple(value.shape) for name, value in expected.items()})

    def read(name: str) -> Tensor:
        return reader.whole(kind, name).to(dtype)

    return {
        name: Entry(dtype, shapes[name], partial(read, name))
        if name in shapes
        else Entry(fixed[name].dtype, stored[name], partial(fixed.__getitem__, name))
        for name in expected
    }


def _compare(
    state: State, stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    both = stored.keys() & expected.keys()
    faults = {
        "lacks": sorted(expected.keys() - stored.keys()),
        "holds what the model has not:": sorted(stored.keys() - expected.keys()),
        "holds another shape of": sorted(n for n in both if stored[n] != expected[n]),
    }
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise DataError(f"{state.path} {fault} {', '.join(names[:3])}{more}")


def outputs(config: ExportConfig) -> list[Output]:
    """The folder of the checkpoint."""
    return [Output(config.out or config.run / "export", CHECKPOINT_FOLDER, [config.run])]


COMMAND = Command("export", ExportConfig, run=run_export, plan=plan, outputs=outputs)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("export", main))
