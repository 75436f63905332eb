"""`latentddae publish SRC --to DIR`: a portable checkpoint with a model card, ready to be shared.

    DIR/model.safetensors or ema.safetensors   the weights
    DIR/config.json                            architecture, objective, latents, history
    DIR/README.md                              the model card

`--hub ORG/NAME` uploads the folder to the Hugging Face Hub; without it nothing leaves the machine.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentddae.core.command import Command
from latentddae.core.config import positional, to_dict
from latentddae.core.errors import ConfigError, run_command
from latentddae.core.files import write_atomic
from latentddae.core.outputs import NEW_FOLDER, Output
from latentddae.models import zoo
from latentddae.models.convert.convert import described, write_portable
from latentddae.models.zoo import Checkpoint, CheckpointHints, Weights

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_LICENCE = "unknown: say it before you share"


@dataclass(frozen=True, kw_only=True)
class PublishConfig(CheckpointHints):
    """Write a checkpoint with a model card."""

    src: str = positional()
    """Portable checkpoint, run folder, or a file or folder of another project or its address
    (https://HOST/FILE#sha256=HEX, hf://ORG/NAME)."""
    to: Path
    """New folder."""
    weights: Weights = "ema"
    """The averaged weights, or those of the last step."""
    licence: str = ""
    """Licence of the weights, as the card names it; empty: that of the project they come from."""
    hub: str = ""
    """ORG/NAME on the Hugging Face Hub to upload to; empty: nowhere."""
    private: bool = False
    """Whether a repository that the upload creates is private."""


def card(checkpoint: Checkpoint, licence: str, name: str) -> str:
    """The model card: front matter, what the network is, how it is used."""
    info, latents = checkpoint.info, checkpoint.latent_spec
    settings = to_dict(checkpoint.model.config)
    images = info.get("images_seen")
    rows = {
        "weights": info["weights"],
        "images seen in training": "unknown" if images is None else f"{images:,}",
        "classes": len(info.get("classes") or ()) or settings.get("num_classes", 0),
        "objective": to_dict(checkpoint.objective),
        "input": f"{latents.shape} {latents.kind} of {latents.autoencoder}",
        "data fingerprints": info.get("data") or "unknown",
        "project": info.get("project", "latentddae"),
        "sha256 of the source": info["sha256"],
        "licence": licence,
    }
    return "\n".join(
        [
            "---",
            "library_name: latentddae",
            "tags: [diffusion, representation-learning]",
            f"license: other\nlicense_name: {licence!r}",
            "---",
            f"# {name}",
            "",
            f"A {described(checkpoint)}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
            "```python",
            "from latentddae.models import zoo",
            "",
            f'checkpoint = zoo.load("{name}", weights="{info["weights"]}")',
            "```",
            "",
            "## Architecture",
            "",
            *(f"- {key}: {value}" for key, value in settings.items()),
            "",
        ]
    )


def open_source(config: PublishConfig) -> Checkpoint:
    """The checkpoint; ConfigError for a folder that exists or an upload that cannot work."""
    if config.to.exists():
        raise ConfigError(f"{config.to} exists already; choose another name")
    if config.hub:
        _import_hub()
    return zoo.load(config.src, config.weights, hints=config.hints)


def publish(config: PublishConfig) -> None:
    """Write the folder, and upload it if that was asked for."""
    checkpoint = open_source(config)
    licence = config.licence or checkpoint.info.get("licence") or DEFAULT_LICENCE
    config.to.parent.mkdir(parents=True, exist_ok=True)
    write_portable(checkpoint, config.to)
    write_atomic(config.to / "README.md", card(checkpoint, licence, config.to.name))
    print(f"{config.to}: {described(checkpoint)}")
    if config.hub:
        upload(config.to, config.hub, config.private)


def upload(folder: Path, repository: str, private: bool) -> None:
    """Upload a folder. Raises ConfigError with the Hub's own words if that fails."""
    hub = _import_hub()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        address = hub.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # no network, no token, no permission: the message says it
        raise ConfigError(f"{repository}: not uploaded: {error}") from error
    print(f"uploaded to {address}")


def _import_hub() -> "HfApi":
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError("--hub needs the package huggingface_hub") from error
    return HfApi()


def plan(config: PublishConfig) -> str:
    """What would be written and uploaded, after the checks of `publish`."""
    where = f", then to the Hub as {config.hub}" if config.hub else ""
    return f"{described(open_source(config))} to {config.to}{where}"


def outputs(config: PublishConfig) -> list[Output]:
    """The new folder."""
    return [Output(config.to, NEW_FOLDER, [config.src])]


COMMAND = Command("publish", PublishConfig, run=publish, plan=plan, outputs=outputs)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("publish", main))
