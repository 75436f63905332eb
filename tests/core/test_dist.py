"""Who am I: the launcher variables of deepspeed, torchrun, Slurm and none."""

import os
import re
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from latentddae.core import dist
from latentddae.core.dist import (
    World,
    check_launcher_env,
    device_for,
    slurm_port,
    world_from_environment,
)
from latentddae.core.errors import ConfigError, run_command


def test_torchrun_and_deepspeed_variables() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert world_from_environment(env) == World(3, 8, 1, "environment")


def test_a_port_that_is_none_is_refused() -> None:
    """`torchrun --master-port 0` passes it on, and the ranks would try it for half an hour."""
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with pytest.raises(ConfigError, match="--standalone"):
        world_from_environment(env)
    assert world_from_environment({**env, "MASTER_PORT": "29500"}).size == 2
    assert world_from_environment({**env, "WORLD_SIZE": "1"}) == World(launcher="environment")


def test_slurm_step_variables() -> None:
    env = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
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
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        world_from_environment({"RANK": "2", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "0"}, "RANK=0 is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set without RANK"),
    ],
)
def test_half_of_a_launch_is_refused(env: dict[str, str], said: str) -> None:
    """Every process would believe that it is alone, and do the work of all."""
    with pytest.raises(ConfigError, match=said):
        world_from_environment(env)
    step = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    assert world_from_environment(env | step).rank == 1  # srun says it all


def test_a_batch_script_that_forgot_srun_is_refused() -> None:
    """Slurm sets these in the script of a job with two tasks; one process would wait
    for the other for ever."""
    env = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    with pytest.raises(ConfigError, match="put `srun` before"):
        world_from_environment(env)


MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({}, ""),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, ""),
        ({"RANK": "1"}, "without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "without RANK"),
        ({"WORLD_SIZE": "1"}, ""),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "rank 3 of 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0"}, "without MASTER_PORT"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"},
            "hide Slurm's 8 tasks",
        ),
        (  # torchrun, one on each of two nodes
            {"RANK": "9", "WORLD_SIZE": "16", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
            | {"LOCAL_WORLD_SIZE": "8", **MEETING},
            "",
        ),
    ],
)
def test_contradictions(env: dict[str, str], problem: str) -> None:
    found = list(check_launcher_env(env))
    assert len(found) == bool(problem)
    assert problem in "".join(found)


def test_every_step_of_every_job_meets_at_its_own_port() -> None:
    jobs = [
        {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restart)}
        for job in range(4_000_000, 4_000_020)
        for step in range(3)
        for restart in range(3)
    ]
    ports = {slurm_port(env) for env in jobs}
    assert len(ports) == len(jobs)
    assert min(ports) >= 10000 and max(ports) < 32768
    assert slurm_port({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}) == 10700


def see(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_device_is_the_only_one_or_the_local_rank(monkeypatch) -> None:
    """With one GPU per task every rank sees device 0 alone."""
    see(monkeypatch, 1)
    assert device_for(World(5, 8, 5), {}) == torch.device("cuda", 0)
    see(monkeypatch, 8)
    assert device_for(World(5, 8, 5), {}) == torch.device("cuda", 5)
    with pytest.raises(ConfigError, match="local rank 8 has no GPU: 8 visible"):
        device_for(World(8, 16, 8), {})


class FakeCuda:
    """What DeepSpeed asks of a machine with GPUs, and which of them were chosen."""

    def __init__(self) -> None:
        self.chosen: list[str] = []

    def set_device(self, device: object) -> None:
        self.chosen.append(str(device))

    def device_name(self, index: object = None) -> str:
        return "cuda" if index is None else f"cuda:{index}"


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (8, 5)])
def test_one_gpu_per_task_is_number_0_in_every_place(visible, index, monkeypatch) -> None:
    """Local rank 5 where the site binds a GPU to each task, and where all are visible: torch, this
    package before and after the start, and DeepSpeed choose the same one."""
    from deepspeed.runtime import engine as deepspeed_engine
    from deepspeed.runtime.zero import utils as deepspeed_zero

    see(monkeypatch, visible)
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (env | meeting | {"OMPI_COMM_WORLD_LOCAL_RANK": "5"}).items():
        monkeypatch.setenv(name, value)
    fake, groups = FakeCuda(), []
    monkeypatch.setattr(torch.cuda, "set_device", fake.set_device)
    monkeypatch.setattr(
        dist.torch_dist, "init_process_group", lambda *a, **k: groups.append((a, k))
    )
    monkeypatch.setattr(dist, "_NEW_GROUP", lambda **k: groups.append(k))
    monkeypatch.setattr(dist.torch_dist, "new_group", dist.torch_dist.new_group)  # put back
    monkeypatch.setattr(dist, "_host_groups", [])

    world = dist.start(timeout_s=60)
    device = torch.device("cuda", index)
    assert fake.chosen == [str(device)]
    (backend,), options = groups[0]
    assert backend == "nccl" and options["device_id"] == device
    assert groups[1]["backend"] == "gloo" and groups[1]["timeout"].days >= 7
    assert world.rank == 5 and device_for(world) == device
    assert device_for(world_from_environment()) == device  # what later callers see

    class Engine:
        local_rank = -1

    for module in (deepspeed_engine, deepspeed_zero):
        monkeypatch.setattr(module, "get_accelerator", lambda: fake)
    monkeypatch.setattr(deepspeed_engine, "dist", dist.torch_dist)
    monkeypatch.setattr(dist.torch_dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(dist.torch_dist, "get_rank", lambda: 5)
    deepspeed_engine.DeepSpeedEngine._configure_with_arguments(Engine, None, None)
    deepspeed_engine.DeepSpeedEngine._set_distributed_vars(Engine, None)
    assert Engine.device == device and fake.chosen[-1] == str(index)


def test_work_of_rank_0_outlasts_the_time_out(ranks) -> None:
    """The others wait for it, for objects and at barriers longer than tensors may take; a
    collective on tensors ends in time all the same."""

    def work() -> int:
        world = dist.start(timeout_s=2)
        assert dist.on_rank0(lambda: time.sleep(3.5) or "done") == "done"
        if world.is_main:
            time.sleep(3.5)
        assert dist.gather_objects(world.rank) == [0, 1]
        if not world.is_main:
            time.sleep(3.5)
        dist.barrier()
        assert dist.any_rank(world.is_main)
        if world.is_main:
            with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
                dist.sum_tensor(torch.ones(1))
        else:
            time.sleep(3.5)
        return 0

    assert ranks(work, 2, timeout=60) == [0, 0]


def test_a_gpu_job_without_a_gpu_stops(monkeypatch) -> None:
    see(monkeypatch, 0)
    assert device_for(World(), {"SLURM_GPUS_ON_NODE": "0"}) == torch.device("cpu")
    env = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}
    with pytest.raises(ConfigError, match=r"SLURM_GPUS_ON_NODE=8.*sees none.*''.*doctor"):
        device_for(World(), env)


def test_groups_of_deepspeed_get_our_timeout(ranks, tmp_path) -> None:
    """Its data-parallel group is made without one. With torch's default of half an hour the ranks
    would not be done in time."""
    noticed = tmp_path / "noticed"

    def waits_for_a_rank_that_never_comes() -> int:
        from latentddae.training.engine import _import_deepspeed

        world = dist.start(timeout_s=3)
        deepspeed = _import_deepspeed(torch.device("cpu"))
        group = deepspeed.comm.new_group([0, 1])
        if not world.is_main:
            while not noticed.exists():
                time.sleep(0.05)
            return 0
        with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
            torch.distributed.all_reduce(torch.ones(1), group=group)
        noticed.touch()
        return 0

    assert ranks(waits_for_a_rank_that_never_comes, size=2, timeout=60) == [0, 0]


SCRIPT = textwrap.dedent(
    """
    import torch
    from latentddae.core import dist
    from latentddae.core.errors import ConfigError
    world = dist.start(timeout_s=60)
    assert dist.gather_objects(world.rank) == list(range(world.size))
    assert dist.broadcast_object(world.rank) == 0
    assert dist.any_rank(world.rank == 1) == (world.size > 1)
    assert not dist.any_rank(False)
    total = dist.sum_tensor(torch.tensor([world.rank + 1.0]))
    assert total.item() == world.size * (world.size + 1) / 2
    assert dist.on_rank0(lambda: world.rank) == 0
    def refuse():
        raise ConfigError("no")
    try:
        dist.on_rank0(refuse)
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
    """Each rank wishes at its own time; all hear of each wish at the same call,
    without waiting for it."""
    wishes = {0: [0, 0, 1, 0, 0, 0], 1: [0, 1, 0, 0, 1, 0]}

    def ask() -> None:
        rank = dist.start(timeout_s=60).rank
        agreement = dist.AsyncAnyReduce(torch.device("cpu"))
        heard = [agreement.update(bool(wish)) for wish in wishes[rank]]
        assert heard == [False, False, True, True, False, True], heard
        torch.testing.assert_close(
            dist.max_tensor(torch.tensor([rank, -rank])), torch.tensor([1, 0])
        )
        dist.stop()

    assert ranks(ask, 2) == [0, 0]


def test_alone_a_wish_is_granted_at_once() -> None:
    agreement = dist.AsyncAnyReduce(torch.device("cpu"))
    assert [agreement.update(wish) for wish in (False, True, False)] == [False, True, False]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_rank_slices_cover_everything_once_and_differ_by_one_at_most(size, monkeypatch):
    parts = []
    for rank in range(size):
        world = dist.World(rank=rank, size=size)
        monkeypatch.setattr(dist, "world_from_environment", lambda world=world: world)
        parts.append(np.arange(101)[dist.rank_slice(101)])
    assert np.concatenate(parts).tolist() == list(range(101))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_ranks_than_samples_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "world_from_environment", lambda: dist.World(rank=0, size=3))
    with pytest.raises(ConfigError, match="2 samples for 3 ranks"):
        dist.rank_slice(2)


def test_rows_of_real_ranks_are_gathered_in_order(ranks):
    def action():
        dist.start()
        rows = np.arange(202).reshape(101, 2)
        np.testing.assert_array_equal(dist.all_gather_rows(rows[dist.rank_slice(101)]), rows)

    assert ranks(action, 3) == [0, 0, 0]


STEP = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "first"}, "LOCAL_RANK='first'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-3"}, "local rank -3"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "9" * 30}, "local rank 999"),
        (STEP, "SLURM_LOCALID is not set"),
        ({**STEP, "SLURM_PROCID": "1.5"}, "SLURM_PROCID='1.5'"),
        ({**STEP, "SLURM_NTASKS": "2(x2)"}, "SLURM_NTASKS"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(env, said) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        world_from_environment(env)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"MASTER_PORT": "29500"}, "MASTER_ADDR not set"),
        ({"MASTER_ADDR": " ", "MASTER_PORT": ""}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"MASTER_ADDR": "node0", "MASTER_PORT": "tcp"}, "MASTER_PORT='tcp'"),
        ({"MASTER_ADDR": "node0", "MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
        ({"MASTER_ADDR": "node0", "MASTER_PORT": "-1"}, "MASTER_PORT=-1"),
        ({"MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29500"}, "has no address"),
        ({"MASTER_ADDR": "a" * 80, "MASTER_PORT": "29500"}, "has no address"),
    ],
)
def test_a_place_where_no_ranks_can_meet_is_named(env, said, monkeypatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "NAME_S", 0.0)
    with pytest.raises(ConfigError, match=re.escape(said)):
        dist.start()


def test_a_slurm_step_without_nodes_is_refused(monkeypatch) -> None:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST"):
        dist._first_slurm_host()
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="scontrol"):
        dist._first_slurm_host()
    with pytest.raises(ConfigError, match="SLURM_JOB_ID='x'"):
        slurm_port({"SLURM_JOB_ID": "x"})


def test_ranks_that_do_not_come_are_75(ranks, capfd) -> None:
    def alone() -> int:
        os.environ["WORLD_SIZE"] = "2"
        return run_command("x", lambda argv: dist.start(timeout_s=0.5) and None, [])

    assert ranks(alone) == [75]
    assert "not all ranks came to 127.0.0.1:" in capfd.readouterr().err
