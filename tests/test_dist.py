"""Who am I: the launcher variables of deepspeed, torchrun, Slurm and none."""

import subprocess
import sys
import textwrap

import pytest
import torch

from latentddae import dist
from latentddae.dist import World, world_from_environment
from latentddae.errors import ConfigError


def test_torchrun_and_deepspeed_variables() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert world_from_environment(env) == World(3, 8, 1, "environment")


def test_slurm_step_variables() -> None:
    env = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert world_from_environment(env) == World(5, 8, 1, "slurm")


def test_an_interactive_allocation_is_not_a_launch() -> None:
    assert world_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == World()
    assert world_from_environment({}) == World()


def test_launchers_win_over_slurm() -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
    assert world_from_environment(env).size == 2


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="inconsistent"):
        world_from_environment({"RANK": "x", "WORLD_SIZE": "2"})


SCRIPT = textwrap.dedent(
    """
    import torch
    from latentddae import dist
    from latentddae.errors import ConfigError
    world = dist.start(timeout_s=60)
    assert dist.gather_objects(world.rank) == list(range(world.size))
    assert dist.broadcast_object(world.rank) == 0
    assert dist.any_rank(world.rank == 1) == (world.size > 1)
    assert not dist.any_rank(False)
    total = dist.sum_tensor(torch.tensor([world.rank + 1.0]))
    assert total.item() == world.size * (world.size + 1) / 2
    assert dist.on_main(lambda: world.rank) == 0
    def refuse():
        raise ConfigError("no")
    try:
        dist.on_main(refuse)
    except ConfigError as error:
        assert str(error) == "no"
    else:
        raise AssertionError("rank 0's error did not reach this rank")
    dist.stop()
    print("fine", flush=True)
    """
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_collectives(ranks: int, tmp_path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("fine") == ranks


def test_agreement_comes_one_call_later_on_every_rank(ranks) -> None:
    """Each rank wishes at its own time; all hear of each wish at the same call, without waiting for it."""
    wishes = {0: [0, 0, 1, 0, 0, 0], 1: [0, 1, 0, 0, 1, 0]}

    def ask() -> None:
        rank = dist.start(timeout_s=60).rank
        agreement = dist.Agreement(torch.device("cpu"))
        heard = [agreement.ask(bool(wish)) for wish in wishes[rank]]
        assert heard == [False, False, True, True, False, True], heard
        torch.testing.assert_close(
            dist.max_tensor(torch.tensor([rank, -rank])), torch.tensor([1, 0])
        )
        dist.stop()

    assert ranks(ask, 2) == [0, 0]


def test_alone_a_wish_is_granted_at_once() -> None:
    agreement = dist.Agreement(torch.device("cpu"))
    assert [agreement.ask(wish) for wish in (False, True, False)] == [False, True, False]
