"""`latentddae finetune`: a pretrained trunk, cut at a block, fine-tuned with a linear head.

    latentddae finetune --config configs/transfer/finetune_cifar10.yaml \\
        --checkpoint RUN --data DIR --out DIR
    deepspeed latentddae/transfer/finetune.py --config ... [--from-scratch] [key=value ...]

The network sees latents at one fixed noise level, clean by default (l-DAE, arXiv 2401.14404).
`--from-scratch` trains fresh weights by the same recipe on the same samples. It is one more job of
the training loop: the same command continues it, on any number of ranks, and every draw follows
from (seed, images seen). A part of train is held out; of the last weights and their average, the
better one on it is scored once on test.
"""

if __name__ == "__main__":  # before the imports: they take seconds in which a signal would kill
    from latentddae.training.preemption import listen_early

    listen_early()

import sys
from pathlib import Path

import numpy as np

from latentddae.core import dist, files
from latentddae.core.command import Command
from latentddae.core.config import to_dict
from latentddae.core.errors import run_command
from latentddae.core.outputs import Output
from latentddae.training.loop import Loop
from latentddae.training.process import RUN_FOLDER, distributed_run
from latentddae.training.states import State
from latentddae.transfer import results
from latentddae.transfer.extraction.spec import describe_level
from latentddae.transfer.finetuning.task import STATE_KINDS, FinetuneConfig, Task, open_inputs
from latentddae.transfer.results import CellInfo, DataInfo, Result

PROTOCOL = "finetune/1"
RECIPE = (
    *("from_scratch", "norm", "layer_decay", "drop_path", "mix", "holdout", "limit"),
    *("optim", "ema", "total_images", "global_batch", "engine"),
)
"""The settings that decide a result; the others are recorded elsewhere in it or do not."""


def finetune(config: FinetuneConfig) -> Result:
    """Run (or continue) a fine-tuning run and score test once.

    Raises ConfigError for a refused configuration, DataError when numbers go bad, RequeueError when
    a signal stopped the run after a complete save.
    """
    run = Path(config.run)
    with distributed_run(run, "finetune", config.hang_timeout_s, config.retry) as context:
        task = Task(config, context)
        loop = Loop(task.job(), context)
        loop.run_to_end()
        context.watchdog.enter("scoring test")
        return score(task, loop.saver.newest())


def score(task: Task, state: State) -> Result:
    """Choose between the weights on held-out train, score test once, append the result. A
    collective."""
    config, run = task.config, task.context.run
    heldout = task.heldout_accuracies(state)
    chosen = max(STATE_KINDS, key=lambda name: heldout[f"heldout_accuracy_{name}"])
    accuracy = task.accuracy(state, chosen, task.test, np.arange(len(task.test)))
    settings, speed = to_dict(config), dist.on_rank0(lambda: images_per_s(run))
    units = describe_level(task.checkpoint.objective, config.level)
    result = Result(
        kind="finetune",
        checkpoint=task.checkpoint_info,
        protocol={"name": PROTOCOL, **{name: settings[name] for name in RECIPE}},
        cell=CellInfo(**units, block=config.block, noisy_input=config.noisy_input),
        data=DataInfo(
            name=Path(config.data.path).resolve().name,
            train=task.train.fingerprints,
            test=task.test.fingerprints,
            train_split=task.train.split,
            test_split=task.test.split,
        ),
        seed=config.seed,
        n_seen={
            "train": len(task.fit),
            "heldout": len(task.heldout),
            "test": len(task.test),
            "images": state.images,
        },
        accuracy=accuracy,
        top1=accuracy,
        heldout_accuracy=heldout[f"heldout_accuracy_{chosen}"],
        values={**heldout, "chosen": chosen, "images_per_s": speed},
    )
    return dist.on_rank0(lambda: results.append_once(run, result))


def images_per_s(run: Path) -> float | None:
    """Training speed: the median over the rows of a run's metrics.jsonl."""
    rows = files.read_json_lines(run / "metrics.jsonl")
    speeds = [row["images_per_s"] for row in rows if "images_per_s" in row]
    return round(float(np.median(speeds)), 1) if speeds else None


def run(config: FinetuneConfig) -> None:
    """Fine-tune on all ranks and print the result."""
    result = finetune(config)
    if dist.world_from_environment().is_main:
        start = "fresh weights" if config.from_scratch else "pretrained weights"
        assert result.accuracy is not None and result.heldout_accuracy is not None
        print(
            f"fine-tuning from {start}: {100 * result.accuracy:.2f} % on "
            f"{result.n_seen['test']} test samples (block {config.block}, "
            f"{result.values['chosen']} weights, {result.n_seen['images']:,} images; held-out "
            f"{100 * result.heldout_accuracy:.2f} %)"
        )


def plan(config: FinetuneConfig) -> str:
    """What `run` would train, after the same checks as a real start."""
    opened = open_inputs(config, dist.device_for(dist.world_from_environment()))
    start = "fresh weights" if config.from_scratch else "pretrained weights"
    return (
        f"{start}, blocks 1 to {config.block}: {config.total_images:,} images of "
        f"{len(opened.split.fit)} training samples in batches of {config.global_batch}; "
        f"{int(opened.split.heldout.sum())} held-out, {len(opened.test)} test samples "
        f"-> {config.run}"
    )


def outputs(config: FinetuneConfig) -> list[Output]:
    """The run folder."""
    return [Output(Path(config.run), RUN_FOLDER, [config.checkpoint, config.data.path])]


COMMAND = Command("finetune", FinetuneConfig, run=run, plan=plan, outputs=outputs, on_ranks=True)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("finetune", main))
