"""With what a new run begins: fresh weights, another network's, or a state of another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from latentddae.core import config as configuration
from latentddae.core.errors import ConfigError, UsageError
from latentddae.core.files import read_checked_json
from latentddae.models import zoo
from latentddae.models.network import NetworkConfig
from latentddae.models.warm_start import warm_start
from latentddae.training import states
from latentddae.training.config import InitConfig
from latentddae.training.states import State

Origin = Mapping[str, object]
"""What is recorded: the source, its hash, images seen."""


class Branch(NamedTuple):
    """A state of another run, and what is recorded about it."""

    state: State
    origin: Origin


def recorded(run: Path) -> Origin | None:
    """The origin that a run's newest state records; None for a run without one."""
    saved = states.complete_states(run / "state")
    return saved[-1].info.get("origin") if saved else None


def lineage(run: Path) -> str | None:
    """Where a run's weights come from, oldest last, in one line: "b ← branch of a at 3,200 images ←
    initialised from dit.pt (ema weights)". None for a run that began with fresh weights.

    Read from its newest state, or its export. Raises DataError for a damaged file.
    """
    origin, export = recorded(run), run / "export" / "config.json"
    if origin is None and export.is_file():
        origin = read_checked_json(export, "a checkpoint").get("origin")
    steps = []
    while origin:
        steps.append(_step(origin))
        origin = origin.get("origin")  # type: ignore[assignment]
    return " ← ".join([run.resolve().name, *steps]) if steps else None


def _step(origin: Origin) -> str:
    """One ancestor: a run, a checkpoint, or the file that a checkpoint was converted from."""
    if "branch" in origin:
        return f"branch of {origin['branch']} at {origin['images_seen']:,} images"
    if "checkpoint" not in origin:
        return f"converted from {origin.get('path')}"
    facts = [f"{origin['weights']} weights"]
    if origin.get("blocks"):
        facts.append(f"blocks 1 to {origin['blocks']}")
    if origin.get("project"):
        facts.insert(0, str(origin["project"]))
    return f"initialised from {origin['checkpoint']} ({', '.join(facts)})"


def is_new(run: Path) -> bool:
    """Whether a run has no state yet, and thus begins."""
    return not states.complete_states(run / "state")


def open_branch(text: str, model: NetworkConfig, optimizer: str) -> Branch:
    """The state that "RUN@IMAGES" names.

    Raises UsageError for another text, ConfigError for no such state or one of another network or
    `optimizer` (a name).
    """
    name, at, images = text.rpartition("@")
    run = Path(name if at else text)
    if at and not images.replace(",", "").replace("_", "").isdigit():
        raise UsageError(f"branch is RUN@IMAGES, got {text!r}")
    number = int(images.replace(",", "")) if at else None
    state = states.find(run / "state", number)
    changes = configuration.differences(state.info["model"], configuration.to_dict(model))
    for key, (old, new) in changes.items():
        raise ConfigError(
            f"branch: {run} trains a network with {key}={old!r}, this run one with {new!r}; "
            "init.checkpoint takes weights into another shape"
        )
    trained_with = state.info["contract"]["optim"]["name"]
    if trained_with != optimizer:
        raise ConfigError(
            f"branch: {run} trains with optim.name={trained_with}, this run with {optimizer}, "
            "whose moments the state does not have; init.checkpoint takes the weights alone"
        )
    origin = {"branch": str(run), "images_seen": state.images}
    earlier = state.info.get("origin")
    return Branch(state, {**origin, **({"origin": earlier} if earlier else {})})


def initialize(model: nn.Module, config: NetworkConfig, init: InitConfig) -> Origin:
    """Fill a freshly drawn network from a checkpoint; what is recorded about it.

    Raises ConfigError for networks that do not fit, see `warm_start`.
    """
    source = zoo.load(init.checkpoint, init.weights, hints=init.hints)
    start = warm_start(
        source.model.state_dict(), source.model.config, model.state_dict(), config, init.blocks
    )
    model.load_state_dict(start.state)
    names = ("images_seen", "project", "licence", "origin")
    return {
        "checkpoint": init.checkpoint,
        "weights": init.weights,
        "sha256": source.info["sha256"],
        **{name: source.info[name] for name in names if source.info.get(name)},
        "blocks": init.blocks,
        "fresh": start.fresh,
    }
