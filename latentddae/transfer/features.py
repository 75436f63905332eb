"""`latentddae features`: pooled features of whole splits on disk, for any probe.

latentddae features --checkpoint RUN --data latents --level s=0.3 --blocks 5,6,5+6 --out feats
torchrun --nproc-per-node 8 -m latentddae.transfer.features --checkpoint ...
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

from latentddae.core import dist
from latentddae.core.errors import run_command
from latentddae.data.manifest import read_manifest
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import BATCH
from latentddae.transfer.extraction.pooling import KNOWN_POOLS
from latentddae.transfer.extraction.spec import LEVEL_HELP, FeatureSpec, blocks_of, levels_of
from latentddae.transfer.extraction.store import Extraction, extract_to_disk


def open_extraction(args: argparse.Namespace) -> Extraction:
    """The checkpoint and the splits of the command line, checked against each other."""
    checkpoint = inputs.open_checkpoint(args.checkpoint, args.weights)
    levels = levels_of(args.level, checkpoint.objective)
    spec = FeatureSpec(
        level=levels[0],
        blocks=blocks_of(args.blocks, checkpoint.model.config.depth),
        pools=inputs.numbers(args.pools, str, "--pools"),
        noise_samples=args.noise_samples,
        seed=args.seed,
        noisy_input=not args.clean_input,
        precision=args.precision,
    )
    names = inputs.numbers(args.splits, str, "--splits") if args.splits else None
    return Extraction(
        checkpoint=checkpoint,
        checkpoint_info={
            **asdict(inputs.describe_checkpoint(checkpoint, args.checkpoint, args.weights)),
            "ema": checkpoint.info.get("ema") if args.weights == "ema" else None,
        },
        samples={
            split: inputs.open_shards(args.data, split, checkpoint)
            for split in names or read_manifest(args.data)["splits"]
        },
        specs=tuple(replace(spec, level=level) for level in levels),
        batch=args.batch,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae features",
        description="Pooled features of whole splits as memory-mapped float16 files.",
    )
    parser.add_argument("--checkpoint", required=True, help=inputs.CHECKPOINT_HELP)
    parser.add_argument("--data", required=True, type=Path, help="folder of latent shards")
    parser.add_argument("--out", required=True, type=Path, help="folder to be made")
    parser.add_argument("--level", required=True, help=f"{LEVEL_HELP}; several with commas")
    parser.add_argument("--blocks", default="all", help="e.g. 5,6,5+6 (5+6: side by side)")
    parser.add_argument("--pools", default="mean", help=KNOWN_POOLS)
    parser.add_argument("--splits", help="e.g. train,test (default: all of them)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--noise-samples", type=int, default=1, help="noises averaged per sample")
    parser.add_argument(
        "--clean-input", action="store_true", help="clean latent, timestep of the level (l-DAE)"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--batch", type=int, default=BATCH, help="does not change the features")
    args = parser.parse_args(argv)
    world = dist.world_from_environment()
    if world.size > 1:
        dist.start()
    extraction = open_extraction(args)
    meta = extract_to_disk(extraction, args.out)
    if world.is_main:
        for level in meta["levels"]:
            print("noise level " + ", ".join(f"{unit}={level[unit]}" for unit in level))
        source = meta["checkpoint"]
        print(
            f"{args.out}: {meta['n_seen']} samples, blocks {meta['blocks']}, pools "
            f"{meta['pools']}, {source['weights']} weights at {source['images_seen']} images"
        )
    dist.stop()


if __name__ == "__main__":
    sys.exit(run_command("features", main))
