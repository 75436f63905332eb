"""`latentddae knn`: cosine k-nearest-neighbour probe on frozen features of one cell.

latentddae knn --checkpoint RUN --data latents --cell RUN/grid/grid.json --out RUN/knn
"""

import sys
from dataclasses import dataclass

from latentddae.core import dist
from latentddae.core.command import Command
from latentddae.core.errors import run_command
from latentddae.transfer.protocol import session
from latentddae.transfer.protocol.options import ProbeOptions


@dataclass(frozen=True, kw_only=True)
class KnnConfig(ProbeOptions):
    """k-nearest-neighbour probe on the features of one cell; nothing is trained."""


def run(config: KnnConfig) -> None:
    """Run the command and print its results. A collective."""
    results = session.run_probes(session.open_session(config), "knn")
    if dist.world_from_environment().is_main:
        print("\n".join(map(session.format_result, results)))


def plan(config: KnnConfig) -> str:
    """What the command would do."""
    probes = session.open_session(config)
    return f"{session.describe(probes, 'k-NN probe')}\n{session.describe_cost(probes, 'knn')}"


COMMAND = Command("knn", KnnConfig, run=run, plan=plan, outputs=KnnConfig.outputs, on_ranks=True)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("knn", main))
