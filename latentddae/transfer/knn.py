"""`latentddae knn`: cosine k-nearest-neighbour probe on frozen features of one cell.

latentddae knn --checkpoint RUN --data latents --cell RUN/grid/grid.json --out RUN/knn
"""

import sys
from dataclasses import dataclass

from latentddae.core import dist
from latentddae.core.command import Command
from latentddae.core.errors import run_command
from latentddae.transfer.probes import knn as probes
from latentddae.transfer.probes.data import ProbeData
from latentddae.transfer.protocol import session
from latentddae.transfer.protocol.options import ProbeOptions
from latentddae.transfer.results import Json, Result


@dataclass(frozen=True, kw_only=True)
class KnnConfig(ProbeOptions):
    """k-nearest-neighbour probe on the features of one cell; nothing is trained."""


def knn(config: ProbeOptions) -> list[Result]:
    """The results of a k-NN probe, one for each entry of `few_shot`. A collective."""
    opened = session.open_session(config)
    protocol: dict[str, Json] = {"name": probes.PROTOCOL, "temperature": probes.TEMPERATURE}
    if config.few_shot:
        return session.run_few_shot(opened, "knn", protocol, few_shot_probe)
    return [session.run_probe(opened, "knn", protocol, probes.probe)]


def few_shot_probe(data: ProbeData, per_class: int) -> probes.KnnResult:
    """The probe of few samples, with at most as many neighbours as a class has."""
    return probes.probe(data, k_grid=probes.few_shot_grid(per_class))


def run(config: KnnConfig) -> None:
    """Run the command and print its results."""
    results = knn(config)
    if dist.world_from_environment().is_main:
        print("\n".join(map(session.format_result, results)))


def plan(config: KnnConfig) -> str:
    """What the command would do."""
    return session.describe(session.open_session(config), "k-NN probe")


COMMAND = Command("knn", KnnConfig, run=run, plan=plan)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("knn", main))
