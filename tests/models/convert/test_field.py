"""Files as users have them: each gives the right network, or one line that says what to do."""

import argparse
import json
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentddae.core.errors import run_command
from latentddae.diffusion.flow import Flow
from latentddae.models import zoo
from latentddae.models.convert import convert, diffusers

from .conftest import golden

STATED: dict[str, Any] = {"objective": "flow", "time": "data", "num_heads": 4}
SIT = golden("sit_a_weights")
OTHER = {name: value + (name != "pos_embed") for name, value in SIT.items()}
PICKLED: dict[str, dict[str, Any]] = {
    # What DeepSpeed, Lightning, timm and accelerate wrap around a state dict: only "model" is SIT.
    "mp_rank_00_model_states.pt": {
        "module": {f"module.{name}": value.clone() for name, value in SIT.items()},
        **{"buffer_names": ["pos_embed"], "optimizer": None, "ds_version": "0.19.8", "dp": 1},
    },
    "epoch=3.ckpt": {
        "state_dict": SIT,
        **{"epoch": 3, "hyper_parameters": {"lr": 1e-4}, "loops": {}},
    },
    "last.pth.tar.pth": {"state_dict": SIT, "state_dict_ema": OTHER, "arch": "sit", "epoch": 3},
    "paths.pt": {
        **{"model": SIT, "ema": OTHER, "opt": {"state": {}}},
        "args": argparse.Namespace(results_dir=pathlib.PosixPath("results"), lr=1e-4),
    },
}


@pytest.mark.parametrize("name", PICKLED)
def test_wrappers_of_others(name, tmp_path) -> None:
    torch.save(PICKLED[name], tmp_path / name)
    checkpoint = zoo.load(tmp_path / name, weights="model", **STATED)
    state = checkpoint.model.state_dict()
    assert checkpoint.objective == Flow(time="data")
    assert all(torch.equal(state[key], SIT[key]) for key in SIT)
    if any("ema" in key for key in PICKLED[name]):
        ema = zoo.load(tmp_path / name, **STATED).model.state_dict()
        assert torch.equal(ema["final_layer.linear.bias"], SIT["final_layer.linear.bias"] + 1)


def test_repa_as_its_script_saves_it(training_file) -> None:
    """The projectors are there in the average, too, and the arguments are SiT's."""
    arguments = {"model": "SiT-XL/2", "path_type": "linear", "prediction": "v", "proj_coeff": 0.5}
    checkpoint = zoo.load(training_file(golden("repa_a_weights"), **arguments), num_heads=4)
    assert checkpoint.objective == Flow(time="noise") and checkpoint.info["left_out"]


@pytest.mark.parametrize("name", ["bf16.pt", "bf16.safetensors", "old.pt"])
def test_half_precision_and_files_of_before_archives(name, tmp_path) -> None:
    half = {key: value.bfloat16() if "pos" not in key else value for key, value in SIT.items()}
    if name == "bf16.safetensors":
        save_file(half, tmp_path / name)
    else:
        torch.save(half, tmp_path / name, _use_new_zipfile_serialization=name != "old.pt")
    state = zoo.load(tmp_path / name, **STATED).model.state_dict()
    key = "blocks.1.mlp.fc1.weight"
    assert torch.equal(state[key], half[key].float())


@pytest.mark.parametrize("kind", ["shards", "bin", "fp16.safetensors"])
def test_forms_of_a_folder_of_diffusers(kind, bare_file, tmp_path) -> None:
    source = zoo.load(bare_file(SIT), **STATED)
    folder = diffusers.save(tmp_path / "x", source, 300_000 if kind == "shards" else 10**9)
    files = sorted(folder.glob("*.safetensors"))
    if kind == "shards":  # the same, pickled
        index = json.loads((folder / f"{diffusers.FILE}.safetensors.index.json").read_text())
        weight_map = {k: v.replace("safetensors", "bin") for k, v in index["weight_map"].items()}
        text = json.dumps({"weight_map": weight_map})
        (folder / f"{diffusers.FILE}.bin.index.json").write_text(text)
        (folder / f"{diffusers.FILE}.safetensors.index.json").unlink()
    for file in files:
        state = diffusers.foreign.read_safetensors(file)
        file.unlink()
        if kind == "fp16.safetensors":
            save_file({k: v.half() for k, v in state.items()}, folder / f"{diffusers.FILE}.{kind}")
        else:
            torch.save(state, file.with_suffix(".bin"))
    loaded = zoo.load(folder, objective="flow", time="data").model.state_dict()
    for key, value in source.model.state_dict().items():
        expected = value.half().float() if "fp16" in kind and key != "pos_embed" else value
        assert torch.equal(loaded[key], expected), key


def file(name: str, content: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content, folder / name)
        return folder / name

    return make


def text(name: str, content: str, beside: str = "") -> Callable[[Path], Path]:
    """A folder with a JSON file, and an empty file beside it."""

    def make(folder: Path) -> Path:
        (folder / "x").mkdir()
        if name:
            (folder / "x" / name).write_text(content)
        if beside:
            (folder / "x" / beside).write_bytes(b"")
        return folder / "x"

    return make


def truncated(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"x{suffix}"
        torch.save(SIT, path) if suffix == ".pt" else save_file(SIT, path)
        path.write_bytes(path.read_bytes()[:-1000])
        return path

    return make


def run_without_export(folder: Path) -> Path:
    (folder / "run" / "state").mkdir(parents=True)
    return folder / "run"


def part_of_ours(folder: Path) -> Path:
    torch.save(SIT, folder / "a.pt")
    words = [str(folder / "a.pt"), str(folder / "ours"), "--to=latentddae", "--objective=flow"]
    convert.main([*words, "--time=data", "--num-heads=4"])
    return folder / "ours" / "ema.safetensors"


def part_of_diffusers(folder: Path) -> Path:
    torch.save(SIT, folder / "a.pt")
    diffusers.save(folder / "x", zoo.load(folder / "a.pt", **STATED))
    return folder / "x" / f"{diffusers.FILE}.safetensors"


def npz(folder: Path) -> Path:
    np.savez(folder / "x.npz", a=np.ones(3))
    return folder / "x.npz"


masked = {**SIT, "mask_token": torch.ones(1), "decode_blocks.0.x": torch.ones(1)}
prefixed = {f"ema_model.{name}": value for name, value in SIT.items()}
few = {name: value for name, value in SIT.items() if "attn" not in name}
WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (lambda folder: folder / "x.pt", "x.pt is not a checkpoint: it does not exist"),
    "npz": (npz, "neither a folder nor a file of .pt, .pth, .ckpt, .bin, .safetensors"),
    "accelerate": (text("", "", "model.safetensors"), "a file in it may be one: model.safetensors"),
    "unexported": (run_without_export, "`latentddae export "),
    "ours-file": (part_of_ours, "is a part of a checkpoint: give the folder"),
    "diffusers-file": (part_of_diffusers, "has names of diffusers: give its folder"),
    "pixart": (
        text("config.json", '{"_class_name": "PixArtTransformer2DModel"}'),
        "of another library (class PixArtTransformer2DModel)",
    ),
    "transformers": (
        text("config.json", '{"architectures": ["ViTModel"]}'),
        "of another library (class ['ViTModel'])",
    ),
    "broken-json": (text("config.json", "{"), "config.json"),
    "bad-index": (
        text(
            "config.json",
            '{"_class_name": "DiTTransformer2DModel", "num_layers": 1, "patch_size": 2, '
            '"sample_size": 8, "num_attention_heads": 2}',
            "diffusion_pytorch_model.safetensors.index.json",
        ),
        "index.json",
    ),
    "mdt": (file("x.pt", masked), "holds what the network has not: mask_token, decode_blocks.0.x"),
    "ema-pytorch": (
        file("x.pt", {**prefixed, "step": torch.ones(1)}),
        "lacks the names of a DiT, SiT, REPA, LightningDiT or DDAE network; its first are ema_mod",
    ),
    "some-missing": (file("x.pt", few), "lacks blocks.0.attn.qkv.weight, blocks.0.attn.qkv.bias, "),
    "shadow": (file("x.pt", {"shadow_params": [torch.ones(1)]}), "no state dict: shadow_params"),
    "two-averages": (
        file("x.pt", {"ema": SIT, "model_ema": SIT}),
        "holds ema and model_ema: which are its ema weights?",
    ),
    "no-average": (file("x.pt", {"module": SIT}), "has no ema weights; it has: model"),
    "class": (
        file("x.pt", {"model": SIT, "args": np.float64(3.0)}),
        "which is not made; save its state dict alone",
    ),
    "empty": (file("x.pt", {}), "is no state dict: empty"),
    "cut-pt": (truncated(".pt"), "cannot be loaded as weights only"),
    "cut-safetensors": (truncated(".safetensors"), "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line(name, tmp_path, capsys) -> None:
    make, message = WRONG[name]
    source = make(tmp_path)
    words = [str(source), str(tmp_path / "dst"), "--to", "latentddae", "--num-heads", "4"]
    capsys.readouterr()
    status = run_command("convert", convert.main, [*words, "--objective=flow", "--time=data"])
    printed = capsys.readouterr().err
    assert status in (65, 78) and message in printed, printed
    assert printed.count("\n") == 1 and len(printed) < 600
    assert not (tmp_path / "dst").exists()
