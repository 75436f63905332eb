"""Which rank this process is, by the launcher's variables; asked before torch is imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from latentddae.core.errors import ConfigError

MAX_LOCAL_RANKS = 1 << 16


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

    Raises ConfigError for inconsistent or missing variables, and in a batch script of several tasks
    without `srun`.
    """
    env = os.environ if env is None else env
    world = World()
    if "RANK" in env and "WORLD_SIZE" in env:
        local_rank = number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0
        world = World(number(env, "RANK"), number(env, "WORLD_SIZE"), local_rank, "environment")
    # An interactive allocation also sets SLURM_*; only a step with several tasks is a launch.
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env and number(env, "SLURM_NTASKS") > 1:
        if "SLURM_STEP_ID" not in env:  # this one process would wait for the others for ever
            raise ConfigError(
                f"the job has {env['SLURM_NTASKS']} tasks (SLURM_NTASKS) and this process was "
                "not started by srun: put `srun` before the command, or --ntasks=1"
            )
        rank, size = number(env, "SLURM_PROCID"), number(env, "SLURM_NTASKS")
        world = World(rank, size, number(env, "SLURM_LOCALID"), "slurm")
    elif "RANK" in env or env.get("WORLD_SIZE", "1") != "1":  # each rank would work alone
        alone, lacking = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        raise ConfigError(
            f"{alone}={env[alone]} is set without {lacking}: start with torchrun, deepspeed or "
            f"srun, which set both, or unset {alone} for a single process"
        )
    if not 0 <= world.rank < world.size:
        raise ConfigError(f"launcher variables: rank {world.rank} of {world.size} is impossible")
    if not 0 <= world.local_rank < MAX_LOCAL_RANKS:
        raise ConfigError(f"launcher variables: local rank {world.local_rank} is impossible")
    if world.size > 1 and env.get("MASTER_PORT") == "0":  # they would try it until the time-out
        raise ConfigError(
            "MASTER_PORT=0 is no port where the ranks could meet: give torchrun --standalone in "
            "place of --master-port 0, or a number"
        )
    return world


def number(env: Mapping[str, str], name: str) -> int:
    """A variable of a launcher that is a whole number. ConfigError if it is not."""
    if name not in env:
        raise ConfigError(f"launcher variables are inconsistent: {name} is not set")
    try:
        return int(env[name])
    except ValueError as error:
        raise ConfigError(
            f"launcher variables are inconsistent: {name}={env[name]!r} is not a whole number"
        ) from error


def meeting_point(env: Mapping[str, str]) -> tuple[str, int]:
    """Host and port where the ranks meet. ConfigError if the variables do not name one."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name, "").strip()]
    if missing:
        raise ConfigError(
            f"the ranks cannot meet: {' and '.join(missing)} not set; start with torchrun, "
            "deepspeed or srun, or set both"
        )
    port = number(env, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise ConfigError(f"MASTER_PORT={port} is no port: 1 to 65535 are")
    return env["MASTER_ADDR"], port
