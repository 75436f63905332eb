"""Several splits of a data folder as one, for sets whose custom is to fit on train and val."""

import argparse
from typing import Any

from latentddae.data.subsets import Concat, SampleSet
from latentddae.transfer.extraction import inputs


def add_argument(parser: argparse.ArgumentParser) -> None:
    """How a command is told what to fit on."""
    parser.add_argument(
        "--train-splits", default="train", help="splits to fit on, e.g. train,val (default train)"
    )


def open_train(args: argparse.Namespace, checkpoint: Any) -> SampleSet:
    """The splits of --data that fit: one as it is, several as one."""
    names = inputs.numbers(args.train_splits, str, "--train-splits")
    parts = [inputs.open_shards(args.data, name, checkpoint) for name in names]
    return parts[0] if len(parts) == 1 else Concat(parts)
