"""`latentddae <command> ...`: finds the command's module and runs its `main`. Imports
nothing heavy itself."""

import importlib
import sys

from latentddae import __version__
from latentddae.core.errors import run_command
from latentddae.training.preemption import listen_early

COMMANDS = {  # command -> (module with main(argv), one line for --help)
    "demo": ("latentddae.demo", "the whole story on real images, on a laptop CPU"),
    "encode": ("latentddae.data.encoding.encode", "images -> latent shards"),
    "verify": ("latentddae.data.verify", "check a data folder and list what is wrong"),
    "info": ("latentddae.data.info", "what a data folder holds"),
    "preview": ("latentddae.data.preview", "decode samples beside their sources to a PNG"),
    "train": ("latentddae.train", "pretrain a diffusion model on shards (DeepSpeed)"),
    "export": (
        "latentddae.training.export",
        "a run's state -> portable weights, on one CPU process",
    ),
    "compare-curve": (
        "latentddae.training.reference_curve",
        "set a run's loss against a reference curve",
    ),
    "features": (
        "latentddae.transfer.extraction.store",
        "pooled features of whole splits as files",
    ),
    "grid": ("latentddae.transfer.grid", "probe every block at every noise level"),
    "linear": ("latentddae.transfer.probes.logistic", "linear probe on one cell"),
    "knn": ("latentddae.transfer.probes.knn", "k-nearest-neighbour probe on one cell"),
    "finetune": ("latentddae.transfer.finetune", "train a pretrained trunk on, with a linear head"),
    "look": (
        "latentddae.transfer.visualize",
        "nearest neighbours and token colours, for the report",
    ),
    "suite": ("latentddae.transfer.suite", "grid and probes on several transfer sets"),
    "geometry": ("latentddae.transfer.geometry", "alignment, uniformity, rank and CKA of features"),
    "noise-classifier": ("latentddae.transfer.noise_classifier", "accuracy over all noise levels"),
    "segment": ("latentddae.transfer.segment", "linear segmentation on token maps (mIoU)"),
    "correspond": ("latentddae.transfer.correspond", "nearest-neighbour correspondence (PCK)"),
    "compare": ("latentddae.transfer.compare", "the network against its controls, one table"),
    "sample": ("latentddae.generation.sample", "generate images from a checkpoint"),
    "fid": ("latentddae.generation.fid", "FID, sFID, IS, KID, precision and recall of samples"),
    "doctor": ("latentddae.doctor", "can this machine train, and if not, what is wrong"),
    "report": ("latentddae.transfer.report", "results -> one self-contained HTML page"),
}

REQUEUED = (
    "train",
    "finetune",
)  # a signal asks these to save and leave, from their first moment on


def usage() -> str:
    lines = ["usage: latentddae <command> [options]", "", "commands:"]
    lines += [f"  {name:<14} {text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "`latentddae <command> --help` explains a command."]
    return "\n".join(lines)


def run(argv: list[str]) -> int:
    """Run a command line and return its exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"latentddae {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"latentddae: error: unknown command {argv[0]!r}; known: {known}", file=sys.stderr)
        return 2
    if argv[0] in REQUEUED:
        listen_early()
    module = importlib.import_module(COMMANDS[argv[0]][0])
    return run_command(argv[0], module.main, argv[1:])


def main() -> None:
    sys.exit(run(sys.argv[1:]))
