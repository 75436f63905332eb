"""Random damage of files and random command lines: one line and a status, never a traceback.

Every mutation is keyed by its number, so a failure is repeated by its number alone.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentddae.cli import COMMANDS
from latentddae.core import config, files
from latentddae.core.errors import LatentddaeError
from latentddae.data.manifest import read_manifest
from latentddae.data.shards import ShardSet
from latentddae.models import portable, zoo
from latentddae.training.config import TrainConfig
from latentddae.transfer import results
from latentddae.transfer.grids import read_grid
from tests.conftest import tiny_spec

COUNT = 200
"""Mutations of each kind by default; ten times as many with -m slow."""


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Bits flipped, bytes replaced, parts cut out, doubled or put elsewhere."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(out) + 1) if out else 0
        kind = draw.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out = out[:at]
        elif kind == 2:
            out[at:at] = draw.randbytes(draw.randrange(1, 9))
        elif kind == 3:
            del out[at : at + draw.randrange(1, 33)]
        elif kind == 4:
            out[at:at] = out[at : at + draw.randrange(1, 65)]
        else:
            words = (
                b"null",
                b"-1",
                b"1e999",
                b"NaN",
                b"[]",
                b"{}",
                b'""',
                b"\xff",
                b"\x00",
                b"9" * 40,
            )
            out[at : at + draw.randrange(5)] = draw.choice(words)
    return bytes(out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    settings = {"name": "dit", "depth": 1, "hidden_size": 16, "num_heads": 2, "input_size": 8}
    model = config.build_choice(zoo.REGISTRY, settings, "model")
    weights = zoo.build(model, seed=0).state_dict()
    return portable.save(
        tmp_path_factory.mktemp("model") / "export",
        model=model,
        objective=config.build_choice(portable.OBJECTIVES, "flow", "objective"),
        latents=tiny_spec(),
        weights={"ema": weights},
        info={"images_seen": 1, "classes": []},
    )


@pytest.fixture(scope="module")
def result_lines(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results")
    for seed in range(3):
        results.append_once(
            out,
            results.Result(
                kind="knn",
                checkpoint=None,
                protocol={"name": "knn"},
                cell=None,
                data=results.DataInfo(),
                seed=seed,
                n_seen={"train": 3},
                accuracy=0.5,
                values={"k": 3},
            ),
        )
    return out / results.RESULTS


def outcome(action: Callable[[], object]) -> object:
    """What an action gives, or the kind of its refusal. Everything else is a bug."""
    try:
        return action()
    except LatentddaeError as error:
        return type(error)


def attack(path: Path, action: Callable[[], object], count: int, allowed: object = None) -> int:
    """Mutate a file `count` times; the number of mutations that were not refused."""
    original, accepted = path.read_bytes(), 0
    try:
        for number in range(count):
            damaged = mutated(original, random.Random(number))
            path.write_bytes(damaged)
            try:
                found = outcome(action)
            except Exception as error:
                raise AssertionError(f"{path.name}, mutation {number}: {error!r}") from error
            if damaged != original and not isinstance(found, type):
                accepted += 1
                assert allowed is None or found == allowed, f"{path.name}, mutation {number}"
    finally:
        path.write_bytes(original)
    return accepted


@pytest.fixture(params=[COUNT, pytest.param(10 * COUNT, marks=pytest.mark.slow)])
def count(request) -> int:
    return request.param


def test_checkpoints(checkpoint, count):
    def load() -> object:
        state = zoo.load(checkpoint).model.state_dict()
        return files.state_dict_hash(state)

    intact = load()
    for name in ("config.json", "ema.safetensors"):
        attack(checkpoint / name, load, count // 2, allowed=intact)


def test_data_sets(tiny_shards, tmp_path, count):
    root = tmp_path / "data"
    shutil.copytree(tiny_shards, root)

    def load() -> object:
        shards = ShardSet(root, "test")
        return shards.gather(torch.arange(32).numpy()).tobytes(), shards.labels.tobytes()

    intact = load()
    for name in ("manifest.json", "test-000000.idx.npy", "test-000000.tar"):
        attack(root / name, load, count // 2, allowed=intact)


def test_results(result_lines, count):
    attack(result_lines, lambda: results.read(result_lines), count)


def test_json_readers(tmp_path, count):
    path = tmp_path / "grid.json"
    files.write_checked_json(path, {"format": 3, "cells": [{"level": 0.1}], "pools": ["mean"]})
    for action in (
        lambda: read_grid(path),
        lambda: files.read_json_lines(path),
        lambda: read_manifest(tmp_path),
    ):
        attack(path, action, count // 4)


def test_configs(tmp_path, count):
    path = tmp_path / "train.yaml"
    path.write_text(Path("configs/pretrain/demo.yaml").read_text())
    attack(path, lambda: config.load(TrainConfig, path, ["run=x"]), count // 2)


WORDS = (
    *("--help", "--out", "run=@x", "run=007", "[0.9,0.99", "{a: 1", "optim.lr=.inf", "seed=-1"),
    *("--levels", "0.1", "global_batch=1e12", "hang_timeout_s=.inf", "model=dit", "model.=1"),
    *("=", "--", "---", "-x", "a.b.c=1", "data.workers=100000", "total_images=1", "data.path=/no"),
    *("${oc.env:HOME}", "x=${y}", "objective=ddpm", "objective.t=!!python/object:x", "'", "\x00"),
    *("optim.betas=[.9, null]", "--dry-run", "--print-config", "\udcff", "é", "#", "%", "1e999"),
    *("--checkpoint", "none", "--data", "--config", "/dev/null", "--seed", "nan", "model=[1,2]"),
)


def test_command_lines(count, tmp_path, monkeypatch, capfd):
    import importlib

    from latentddae.core.command import parse

    monkeypatch.chdir(tmp_path)
    commands = [importlib.import_module(module).COMMAND for module, _ in COMMANDS.values()]
    for number in range(2 * count):
        draw = random.Random(number)
        command = draw.choice(commands)
        words = [draw.choice(WORDS) for _ in range(draw.randrange(1, 7))]

        def read(command=command, words=words) -> object:
            return parse(command.config, words).record(command.config)

        try:
            outcome(read)
        except Exception as error:
            raise AssertionError(f"{command.name} {words}, line {number}: {error!r}") from error


def test_every_mutation_is_the_same_again():
    data = json.dumps({"a": [1, 2, 3]}).encode()
    first = [mutated(data, random.Random(n)) for n in range(50)]
    assert first == [mutated(data, random.Random(n)) for n in range(50)]
