"""`latentddae <command> ...`: import the command's module and run its `main`.

Only the module of the command that was asked for is imported, so `--help` stays quick.
"""

import difflib
import importlib
import sys

from latentddae import __version__
from latentddae.core.errors import INTERRUPTED, run_command
from latentddae.training.preemption import listen_early

GROUPS = {  # job -> {command: (module with main(argv), one line for --help)}
    "data": {
        "inspect": ("latentddae.data.inspect_source", "what a place with images is read as"),
        "encode": ("latentddae.data.encoding.encode", "images -> latent shards"),
        "info": ("latentddae.data.info", "contents of a data folder"),
        "verify": ("latentddae.data.verify", "check a data folder and list every problem"),
        "train-autoencoder": (
            "latentddae.data.encoding.train_autoencoder",
            "a small autoencoder for demos, trained on any images",
        ),
        "preview": ("latentddae.data.preview", "decoded samples beside their sources, as a PNG"),
    },
    "pretrain": {
        "train": ("latentddae.train", "pretrain a diffusion model on shards (DeepSpeed)"),
        "export": ("latentddae.training.export", "a state of a run -> portable weights, on CPU"),
        "compare-curve": (
            "latentddae.training.reference_curve",
            "a run's loss against a reference curve",
        ),
    },
    "transfer": {
        "grid": ("latentddae.transfer.grid", "ridge probe of every block at every noise level"),
        "linear": ("latentddae.transfer.linear", "linear probe of one cell"),
        "knn": ("latentddae.transfer.knn", "k-nearest-neighbour probe of one cell"),
        "compare": ("latentddae.transfer.compare", "the network against its baselines, one table"),
        "suite": ("latentddae.transfer.suite", "grid and probes on several data sets"),
        "finetune": ("latentddae.transfer.finetune", "fine-tune a pretrained trunk for classes"),
        "features": ("latentddae.transfer.features", "features of whole splits as files"),
        "geometry": ("latentddae.transfer.geometry", "alignment, uniformity, rank, CKA of blocks"),
        "noise-classifier": (
            "latentddae.transfer.noise_classifier",
            "one classifier for all noise levels, and its accuracy curve",
        ),
        "noise-control": (
            "latentddae.transfer.noise_control",
            "its control: a WRN-28-10 on the noisy images",
        ),
        "segment": ("latentddae.transfer.segment", "linear segmentation on token maps (mIoU)"),
        "correspond": ("latentddae.transfer.correspond", "nearest-token correspondence (PCK)"),
        "visualize": ("latentddae.transfer.visualize", "nearest neighbours and token colours"),
        "report": ("latentddae.transfer.report", "results of runs -> one self-contained HTML page"),
    },
    "generate": {
        "sample": ("latentddae.generation.sample", "images from a checkpoint"),
        "fid": ("latentddae.generation.fid", "FID, sFID, IS, KID, precision, recall of samples"),
    },
    "exchange": {
        "convert": ("latentddae.models.convert.convert", "a checkpoint in another format"),
        "publish": ("latentddae.models.convert.publish", "a checkpoint with its model card"),
    },
    "tools": {
        "demo": ("latentddae.demo", "the whole pipeline on real images, on a laptop CPU"),
        "doctor": ("latentddae.doctor", "check that this machine can train"),
    },
}
COMMANDS = {name: entry for commands in GROUPS.values() for name, entry in commands.items()}

# A signal asks these to save and exit, from their first moment on.
REQUEUED = ("train", "finetune")


def usage() -> str:
    """The text of `latentddae --help`."""
    lines = ["usage: latentddae <command> [options]"]
    for job, commands in GROUPS.items():
        lines += ["", f"{job}:"]
        lines += [f"  {name:<17} {text}" for name, (_, text) in commands.items()]
    lines += ["", "`latentddae <command> --help` explains a command."]
    return "\n".join(lines)


def unknown(command: str) -> str:
    """The error message for a command that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(COMMANDS)}"
    return f"latentddae: error: unknown command {command!r}; {hint}"


def run(argv: list[str]) -> int:
    """Run a command line and return its exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"latentddae {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(unknown(argv[0]), file=sys.stderr)
        return 2
    if argv[0] in REQUEUED:
        listen_early()
    module = importlib.import_module(COMMANDS[argv[0]][0])
    return run_command(argv[0], module.main, argv[1:])


def main() -> None:
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # while a command is being imported
        sys.exit(INTERRUPTED)
