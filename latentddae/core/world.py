"""Which rank this process is, by the launcher's variables; asked before torch is imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from latentddae.core.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all ranks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "none"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_from_environment(env: Mapping[str, str] | None = None) -> World:
    """This process by the launcher's variables: RANK and WORLD_SIZE (deepspeed, torchrun), else a
    multi-task srun step, else a single process.

    Raises ConfigError for inconsistent variables, and in a batch script of several tasks without
    `srun`.
    """
    env = os.environ if env is None else env
    try:
        world = World()
        if "RANK" in env and "WORLD_SIZE" in env:
            local_rank = int(env.get("LOCAL_RANK", 0))
            world = World(int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank, "environment")
        # An interactive allocation also sets SLURM_*; only a step with several tasks is a launch.
        elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
            if "SLURM_STEP_ID" not in env:  # this one process would wait for the others for ever
                raise ConfigError(
                    f"the job has {env['SLURM_NTASKS']} tasks (SLURM_NTASKS) and this process was "
                    "not started by srun: put `srun` before the command, or --ntasks=1"
                )
            rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
            world = World(rank, size, int(env["SLURM_LOCALID"]), "slurm")
    except (KeyError, ValueError) as error:
        raise ConfigError(f"launcher variables are inconsistent: {error}") from error
    if not 0 <= world.rank < world.size:
        raise ConfigError(f"launcher variables: rank {world.rank} of {world.size} is impossible")
    if world.size > 1 and env.get("MASTER_PORT") == "0":  # they would try it until the time-out
        raise ConfigError(
            "MASTER_PORT=0 is no port where the ranks could meet: give torchrun --standalone in "
            "place of --master-port 0, or a number"
        )
    return world
