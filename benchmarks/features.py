"""What mid-block features cost against the usual way: hooks on every block of a full forward pass.

    python benchmarks/features.py [--threads 1]

DiT-S/2 on 4x32x32 latents, block 6 of 12, token means. The usual way runs the network to its
output and keeps every block's tokens until they are pooled (as the published probing code does);
ours folds the noise level into the weights, pools in the loop and ends at the block. The features
are compared before anything is timed.
"""

import argparse

import torch
from harness import cpu_seconds, machine, record
from torch import Tensor

from latentddae.core.precision import Precision
from latentddae.diffusion import OBJECTIVES
from latentddae.models import DiT, zoo
from latentddae.models.untrained import randomize_gates
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.extract import pooled_blocks
from latentddae.transfer.extraction.trunk import precision_of, trunk_at

IMAGES, BLOCK, LEVEL = 32, 6, 0.3
TOLERANCE = {"fp32": 2e-6, "bf16": 1e-2}


def network() -> DiT:
    """DiT-S/2 with every path open."""
    model = zoo.build("dit_s_2").eval().requires_grad_(False)
    randomize_gates(model, 0)
    return model


class Usual:
    """Hooks on every block, a full forward pass, pooling at the end."""

    def __init__(self, model: DiT, x: Tensor, t: Tensor) -> None:
        self.model, self.x, self.t = model, x, t
        self.taps: dict[int, Tensor] = {}
        for number, block in enumerate(model.blocks, start=1):
            block.register_forward_hook(
                lambda _module, _inputs, tokens, number=number: self.taps.update({number: tokens})
            )

    @torch.inference_mode()
    def features(self) -> Tensor:
        self.model(self.x, self.t.expand(len(self.x)))
        return self.taps[BLOCK].float().mean(dim=1)

    def tap_bytes(self) -> int:
        return sum(tokens.nbytes for tokens in self.taps.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print(machine())
    objective = OBJECTIVES["ddpm"]()
    x = torch.randn(IMAGES, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([objective.to_time(LEVEL)])
    checkpoint = Checkpoint(network(), objective, None, {})
    shipped: Precision = precision_of(checkpoint)
    usual = {dtype: Usual(network(), x, t) for dtype in {"fp32", shipped}}
    if shipped == "bf16":
        usual["bf16"].model.bfloat16()
    trunks = {dtype: trunk_at(checkpoint, LEVEL, BLOCK, dtype) for dtype in usual}

    def ours(dtype: str) -> Tensor:
        return pooled_blocks(trunks[dtype], x, [BLOCK], ["mean"])[BLOCK, "mean"]

    truth = usual["fp32"].features()
    for dtype in usual:
        usual[dtype].features()
        gap = float((ours(dtype) - truth).norm() / truth.norm())
        print(f"{dtype}: folded features differ from the fp32 ones by {gap:.1e}")
        if not gap < TOLERANCE[dtype]:
            raise SystemExit(f"folded {dtype} features are wrong: {gap:.1e}")
    runs = {f"usual {dtype}": usual[dtype].features for dtype in usual}
    runs |= {f"ours {dtype}": lambda dtype=dtype: ours(dtype) for dtype in usual}
    ms = {name: 1e3 * value / IMAGES for name, value in cpu_seconds(runs, rounds=5).items()}
    print({name: round(value, 1) for name, value in ms.items()})
    lower = {"unit": "CPU ms / image", "higher_is_better": False}
    opponent = "full fp32 forward, hooks on all blocks; ours as shipped, " + shipped
    record(
        "features_midblock_vs_hooks_fp32",
        ms[f"ours {shipped}"],
        ms["usual fp32"],
        opponent=opponent,
        **lower,
    )
    opponent = f"full forward in {shipped} too, hooks on all blocks"
    record(
        "features_midblock_vs_full_same_dtype",
        ms[f"ours {shipped}"],
        ms[f"usual {shipped}"],
        opponent=opponent,
        **lower,
    )
    pooled = ours("fp32").nbytes
    record(
        "features_tap_memory_vs_hooks",
        pooled * network().config.depth / 1e6,
        usual["fp32"].tap_bytes() / 1e6,
        "MB kept for all blocks",
        "token maps of all blocks, fp32",
        higher_is_better=False,
    )


if __name__ == "__main__":
    main()
