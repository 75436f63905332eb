"""Portable weights out of a run's resume state: one CPU process, no DeepSpeed, any number of ranks and ZeRO stage.

    latentddae export RUN [--out DIR] [--weights ema|model|both] [--dtype fp32|bf16] [--state images-...]
                          [--halflife IMAGES]

The tensors are read, converted and written one at a time. The file holds exactly the tensors of the
model; anything else is refused.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from latentddae.core import config as configuration
from latentddae.core.errors import ConfigError, DataError, UsageError, run_command
from latentddae.core.safetensors_stream import Entry
from latentddae.data.latents import LatentSpec
from latentddae.diffusion import OBJECTIVES
from latentddae.models import zoo
from latentddae.models.network import NetworkConfig
from latentddae.training import states
from latentddae.training.ema import EmaConfig
from latentddae.training.states import State, StateReader

WEIGHTS = {"ema": ("ema",), "model": ("model",), "both": ("model", "ema")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, export, and say where the checkpoint is."""
    parser = argparse.ArgumentParser(prog="latentddae export", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/export")
    parser.add_argument("--weights", choices=WEIGHTS, default="both", help="default: both")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: fp32")
    parser.add_argument("--state", metavar="images-N", help="default: the newest intact one")
    parser.add_argument("--halflife", type=int, metavar="IMAGES", help="which of several averages")
    args = parser.parse_args(argv)
    if not (args.run / "state").is_dir():
        raise ConfigError(f"{args.run} is not a run folder: it has no state/")
    state = states.find(args.run / "state", _images(args.state))
    out = args.out or args.run / "export"
    folder = export(state, out, WEIGHTS[args.weights], DTYPES[args.dtype], args.halflife)
    print(f"{args.weights} weights after {state.images:,} images: {folder}")


def _images(name: str | None) -> int | None:
    """images-000000012800, or the number alone."""
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

    `halflife` picks one of several averages. Raises ConfigError if there is no such average, DataError
    if the state does not hold the tensors of its model, WriteError if the folder cannot be written.
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
            "conditional": info["conditional"],
            "seed": info["contract"]["seed"],
        },
    )


def _average(ema: EmaConfig, halflife: int | None) -> str:
    """The kind of the average with this half-life; None: of the first."""
    for kind, images in ema.halflives().items():
        if halflife in (None, images):
            return kind
    known = ", ".join(map(str, ema.halflives().values()))
    raise ConfigError(
        f"there is no average with a half-life of {halflife} images; there are: {known}"
    )


def _entries(
    reader: StateReader, kind: str, model_config: NetworkConfig, dtype: torch.dtype
) -> dict[str, Entry]:
    """The tensors of a model in the order of its state dict, to be read when their turn comes.

    Trained weights are converted to `dtype`; frozen ones and buffers stay as they were.
    """
    with torch.device("meta"):
        wanted = zoo.build(model_config).state_dict()
    constants, shapes = reader.non_trainable_state(), reader.shapes
    if not constants:  # states of the first versions left out what the configuration fixes
        constants = dict(zoo.build(model_config).named_buffers())
    stored = {**shapes, **{name: tuple(value.shape) for name, value in constants.items()}}
    _compare(reader.state, stored, {name: tuple(value.shape) for name, value in wanted.items()})

    def read(name: str) -> Tensor:
        return reader.whole(kind, name).to(dtype)

    return {
        name: Entry(dtype, shapes[name], partial(read, name))
        if name in shapes
        else Entry(constants[name].dtype, stored[name], partial(constants.__getitem__, name))
        for name in wanted
    }


def _compare(
    state: State, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    other = [name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name]]
    for names, fault in (
        (missing, "lacks"),
        (extra, "holds what the model has not:"),
        (other, "holds another shape of"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise DataError(f"{state.path} {fault} {', '.join(names[:3])}{more}")


if __name__ == "__main__":
    sys.exit(run_command("export", main))
