"""Runs of a few thousand weights: at the level of the engine, where every loss is a pure function
of images seen, and as the command `train`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latentddae import train
from latentddae.core import dist, rng
from latentddae.core.errors import run_command
from latentddae.models import DiTConfig, UNetConfig, zoo
from latentddae.models.network import NetworkConfig
from latentddae.models.untrained import randomize_gates
from latentddae.training import state_reader, states
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.ema import Ema, EmaConfig
from latentddae.training.engine import Engine
from latentddae.training.optimizers import OptimConfig, lr_at

MODEL = DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=0)
UNET = UNetConfig(
    image_size=8,
    in_channels=4,
    base_channels=32,
    channel_mults=(1, 1),
    blocks_per_level=1,
    dropout=0.2,
)
NETWORKS: dict[str, NetworkConfig] = {
    "plain": MODEL,
    "every-option": replace(
        MODEL,
        qk_norm=True,
        norm="rms",
        mlp="swiglu",
        rope=True,
        adaln_shift=False,
        shared_adaln=True,
        register_tokens=2,
        head_width=32,
        head_heads=2,
    ),
    "three-blocks": replace(MODEL, depth=3),  # two ranks' halves meet inside a matrix
    "unet": UNET,
    "unet-without-dropout": replace(UNET, dropout=0.0),
}
BATCH = 12
TOTAL = 100 * BATCH
OPTIM = OptimConfig(lr=2e-3, schedule="cosine", warmup_images=5 * BATCH, weight_decay=0.01)
OPTIMIZERS = {"adamw": OPTIM, "muon": replace(OPTIM, name="muon", momentum=0.9)}


@dataclass
class Toy:
    """One rank of a run; the model predicts its input from its input."""

    engine: Engine
    ema: Ema
    images: int = 0
    losses: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)
    """A number that tells which global batch a step saw."""

    @classmethod
    def start(
        cls,
        stage: int,
        precision: str = "fp32",
        model: nn.Module | None = None,
        network: NetworkConfig = MODEL,
        optimizer: str = "adamw",
        **settings: Any,
    ) -> "Toy":
        world = dist.start()
        if model is None:
            model = zoo.build(network, seed=1)
            randomize_gates(model, seed=2)
        config = EngineConfig(  # type: ignore[arg-type]
            zero_stage=stage, precision=precision, **settings
        )
        optim = OPTIMIZERS[optimizer]
        engine = Engine(model, config, optim, world, torch.device("cpu"), BATCH)
        ema = EmaConfig(halflife_images=10 * BATCH, extra_halflives_images=(40 * BATCH,))
        return cls(engine, Ema(ema, engine.masters))

    def train(self, steps: int) -> "Toy":
        world, share = self.engine.world, BATCH // self.engine.world.size
        for _ in range(steps):
            positions = self.images + world.rank * share + torch.arange(share)
            x = rng.normal(0, "toy", positions, (4, 8, 8))
            t = rng.uniform(0, "toy time", positions)
            sums = torch.zeros(2, dtype=torch.float64)
            for number, (x_part, t_part) in enumerate(self.engine.micro_batches(x, t)):
                rng.seed_torch(0, f"dropout/{self.images}/{world.rank}/{number}")
                loss = ((self.engine.model(x_part, t_part) - x_part) ** 2).mean(dim=(1, 2, 3))
                self.engine.backward(loss.mean())
                sums += torch.stack([loss.detach().double().sum(), x_part.double().sum()])
            self.engine.step(lr_at(OPTIM, self.images, TOTAL))
            assert self.engine.applied()
            self.images += BATCH
            self.ema.update(self.engine.masters, self.images, BATCH)
            loss, batch = (dist.sum_tensor(sums) / BATCH).tolist()
            self.losses.append(loss)
            self.batches.append(round(batch, 9))
        return self

    def save(self, folder: Path) -> states.State:
        info = {
            "images": self.images,
            "optimizer_steps": self.engine.optimizer_steps,
            "shapes": self.engine.shapes,
        }
        content = states.RankState(
            self.engine.world,
            list(self.engine.shapes),
            self.engine.fragments,
            states.partitions(self.engine, self.ema),
            self.engine.non_trainable_state(),
        )
        hidden = states.prepare_folder(folder, self.images, 0)
        part = states.write_rank_file(hidden, self.images, content)
        return states.commit(hidden, part, None, info)

    def load(self, folder: Path) -> "Toy":
        state = states.find(folder)
        state_reader.load(state, self.engine, self.ema)
        self.images = state.images
        return self

    def whole(self) -> dict[str, torch.Tensor]:
        """Every parameter, moment and average, whole, and the weights the model
        computes with (a collective)."""
        out = {}
        for kind, flat in states.partitions(self.engine, self.ema).items():
            for name, shape in self.engine.shapes.items():
                box = torch.zeros(shape)
                for f in self.engine.fragments:
                    if f.name == name and f.is_in(flat):
                        box.view(-1)[f.start :][: f.numel] = f.of(flat)
                dist.sum_tensor(box.view(torch.int32))
                out[f"{kind} {name}"] = box
        return out


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def network(request) -> NetworkConfig:
    """The plain network, or by indirect parametrisation another one of NETWORKS."""
    return NETWORKS[getattr(request, "param", "plain")]


@pytest.fixture
def in_ranks(
    ranks: Callable[..., list[int]], tmp_path: Path
) -> Callable[[int, Callable[[], Any]], list[Any]]:
    """Run an action in fresh ranks and return what it returned on each of them."""

    def run(size: int, action: Callable[[], Any]) -> list[Any]:
        def kept() -> None:
            result = action()
            torch.save(result, tmp_path / f"result-{dist.world_from_environment().rank}.pt")
            dist.stop()

        assert ranks(kept, size) == [0] * size
        return [torch.load(tmp_path / f"result-{rank}.pt") for rank in range(size)]

    return run


@pytest.fixture(scope="session")
def start(tiny_shards: Path, pixel_shards: Path) -> Callable[..., int]:
    """Start (or continue) a tiny run of the real command in this process; its exit status."""
    configs = {"dit": ("tiny.yaml", tiny_shards), "unet": ("tiny_unet.yaml", pixel_shards)}

    def begin(run: Path, *arguments: str, data: Path | None = None, kind: str = "dit") -> int:
        config, shards = configs[kind]
        file = str(Path(__file__).parent / config)
        given = ["--config", file, f"run={run}", f"data.path={data or shards}", *arguments]
        return run_command("train", train.main, given)

    return begin


def stored(reader: state_reader.StateReader, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of which a state holds this kind, whole."""
    for name in reader.shapes:
        if (kind, name) in reader._pieces:
            yield name, reader.whole(kind, name)


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Everything a run has come to: each parameter, moment and average of its
    newest intact state, whole."""

    def of(run: Path) -> dict[str, torch.Tensor]:
        state = states.find(run / "state")
        reader = state_reader.StateReader(state)
        out = {
            f"{kind} {name}": value
            for kind in sorted(reader.kinds)
            for name, value in stored(reader, kind)
        }
        return out | {
            "images": torch.tensor(state.images),
            "adam steps": torch.tensor(state.info["optimizer_steps"]),
        }

    return of


@pytest.fixture(scope="session")
def same(content: Callable[[Path], dict[str, torch.Tensor]]) -> Callable[[Path, Path], bool]:
    """Whether two runs ended in the same bits."""

    def equal(one: Path, other: Path) -> bool:
        a, b = content(one), content(other)
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return equal
