"""`latentddae features`: pooled features of whole splits on disk, for any probe.

latentddae features --checkpoint RUN --data latents --levels s=0.3 --blocks 5,6,5+6 --out feats
torchrun --nproc-per-node 8 -m latentddae.transfer.features --checkpoint ...
"""

import sys
from dataclasses import asdict, dataclass, replace

from latentddae.core import dist
from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import run_command
from latentddae.core.outputs import Output
from latentddae.core.precision import Precision
from latentddae.data.manifest import read_manifest
from latentddae.transfer.extraction.inputs import TransferOptions, open_shards
from latentddae.transfer.extraction.spec import FeatureSpec, blocks_of, levels_of
from latentddae.transfer.extraction.store import (
    FEATURES_FOLDER,
    Extraction,
    check_out,
    extract_to_disk,
)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(TransferOptions):
    """Pooled features of whole splits as memory-mapped float16 files."""

    levels: tuple[str, ...]
    """Noise levels: s in [0, 1], or t=121, sigma_over_alpha=0.4, log_snr=1.5."""
    blocks: tuple[str, ...] = ("all",)
    """Blocks, 1 to depth; 5+6 concatenates two."""
    pools: tuple[str, ...] = ("mean",)
    """Poolings over tokens: mean, max, grid2, grid3, ..., cls; each with norm- before it."""
    splits: tuple[str, ...] = ()
    """Splits to extract. Default: all that the folder has."""
    noise_samples: int = 1
    """Features are averaged over this many noises."""
    noisy_input: bool = True
    """False: the network sees the clean latent with the timestep of the level (l-DAE)."""
    seed: int = 0
    """Of the noise."""
    precision: Precision = "auto"
    """Of matrix products; auto is bf16 where the hardware has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("noise_samples",))


def open_extraction(config: FeaturesConfig) -> Extraction:
    """The checkpoint and the splits of a command, checked against each other."""
    checkpoint = config.open_checkpoint()
    levels = levels_of(config.levels, checkpoint.objective)
    spec = FeatureSpec(
        level=levels[0],
        blocks=blocks_of(config.blocks, checkpoint.model.config.depth),
        pools=config.pools,
        noise_samples=config.noise_samples,
        seed=config.seed,
        noisy_input=config.noisy_input,
        precision=config.precision,
    )
    ema = checkpoint.info.get("ema") if config.weights == "ema" else None
    return Extraction(
        checkpoint=checkpoint,
        checkpoint_info={**asdict(config.describe(checkpoint)), "ema": ema},
        samples={
            split: open_shards(config.data, split, checkpoint)
            for split in config.splits or read_manifest(config.data)["splits"]
        },
        specs=tuple(replace(spec, level=level) for level in levels),
        batch=config.batch,
    )


def features(config: FeaturesConfig) -> None:
    """Write the folder on all ranks and print what it holds."""
    world = dist.world_from_environment()
    if world.size > 1:
        dist.start()
    meta = extract_to_disk(dist.on_all_ranks(lambda: open_extraction(config)), config.out)
    if world.is_main:
        for level in meta["levels"]:
            print("noise level " + ", ".join(f"{unit}={value}" for unit, value in level.items()))
        source = meta["checkpoint"]
        print(
            f"{config.out}: {meta['n_seen']} samples, blocks {meta['blocks']}, pools "
            f"{meta['pools']}, {source['weights']} weights at {source['images_seen']} images"
        )


def plan(config: FeaturesConfig) -> str:
    """What `features` would write."""
    extraction = open_extraction(config)
    state = "finished already" if check_out(extraction, config.out) else "to be written"
    counts = {split: len(samples) for split, samples in extraction.samples.items()}
    spec = extraction.specs[0]
    return (
        f"{config.out}: {counts} samples, noise levels {extraction.levels}, blocks "
        f"{list(spec.blocks)}, pools {list(spec.pools)}; {state}"
    )


def outputs(config: FeaturesConfig) -> list[Output]:
    """The folder of features."""
    return [Output(config.out, FEATURES_FOLDER, config.read_folders)]


COMMAND = Command(
    "features", FeaturesConfig, run=features, plan=plan, outputs=outputs, on_ranks=True
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(run_command("features", main))
