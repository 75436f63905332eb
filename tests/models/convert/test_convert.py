"""`latentddae convert` and `publish`: round trips are bit-equal, what does not fit is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentddae import cli
from latentddae.core.errors import ConfigError
from latentddae.data.latents import LatentSpec
from latentddae.diffusion.flow import Flow
from latentddae.models import zoo
from latentddae.models.convert import convert as convert_command
from latentddae.models.convert import publish as publish_command

from .conftest import golden

XL_2_PARAMETERS = 675_129_632
STATED = ["--objective", "flow", "--time", "data", "--num-heads", "4"]


@pytest.fixture
def ours(tmp_path) -> Path:
    """A portable checkpoint of SiT's weights, with a history."""
    shape = {"input_size": 8, "hidden_size": 64, "depth": 3, "num_heads": 4, "num_classes": 10}
    config = zoo.build("dit", learn_sigma=True, **shape).config
    return zoo.save(
        tmp_path / "ours",
        model=config,
        objective=Flow(time="data"),
        latents=LatentSpec(kind="moments", channels=4, size=8, autoencoder="demo"),
        weights={"ema": golden("sit_a_weights")},
        info={"images_seen": 1000, "classes": [], "data": {"codec": "abc"}, "seed": 1},
    )


def convert(*words: object) -> None:
    convert_command.main([str(word) for word in words])


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "ema.safetensors")


@pytest.mark.parametrize(("to", "name"), [("dit", "x.pt"), ("diffusers", "x")])
def test_round_trips_are_bit_equal(ours, tmp_path, to, name, capsys) -> None:
    convert(ours, tmp_path / name, "--to", to)
    assert "objective flow (t = 1 is data), ema weights" in capsys.readouterr().out
    convert(tmp_path / name, tmp_path / "again", "--to", "latentddae", *STATED)
    before, after = weights(ours), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    one, two = (zoo.load(folder) for folder in (ours, tmp_path / "again"))
    assert (one.model.config, one.objective) == (two.model.config, two.objective)


def test_our_own_format_keeps_history_and_origin(ours, tmp_path) -> None:
    convert(ours, tmp_path / "copy", "--to", "latentddae")
    facts = json.loads((tmp_path / "copy" / "config.json").read_text())
    before = json.loads((ours / "config.json").read_text())
    assert facts.pop("origin") == {"path": str(ours), "sha256": zoo.load(ours).info["sha256"]}
    for hashed in ("files", "check"):  # of the bytes, whose header names the kind of weights
        del facts[hashed], before[hashed]
    assert facts == before
    convert(tmp_path / "copy", tmp_path / "again", "--to", "latentddae")
    origin = json.loads((tmp_path / "again" / "config.json").read_text())["origin"]
    assert origin["path"] == str(tmp_path / "copy") and origin["origin"]["path"] == str(ours)


def test_an_official_state_dict_has_the_published_names(ours, tmp_path) -> None:
    convert(ours, tmp_path / "x.pt", "--to", "dit")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert state.keys() == golden("dit_a_weights").keys()


def test_modern_options_go_to_a_state_dict_and_not_to_diffusers(bare_file, tmp_path) -> None:
    file = bare_file(golden("lightning_a_weights"))
    with pytest.raises(ConfigError, match="cannot have qk_norm=True"):
        convert(file, tmp_path / "x", "--to", "diffusers")
    convert(file, tmp_path / "x.pt", "--to", "dit", "--dry-run")
    assert not (tmp_path / "x.pt").exists()
    convert(file, tmp_path / "x.pt", "--to", "dit")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert state.keys() == golden("lightning_a_weights").keys()


def test_what_exists_or_has_another_ending_is_refused(ours, tmp_path) -> None:
    with pytest.raises(ConfigError, match="is also read"):
        convert(ours, ours, "--to", "latentddae")
    for to, name in (("dit", "x"), ("diffusers", "x.pt")):
        with pytest.raises(ConfigError, match=r"--to dit writes a .pt file"):
            convert(ours, tmp_path / name, "--to", to)


def test_missing_unknown_and_misshapen_weights_are_listed(bare_file, tmp_path) -> None:
    good = golden("dit_a_weights")
    for change, message in (
        ({"blocks.1.attn.qkv.bias": None}, r"bare.pt lacks blocks.1.attn.qkv.bias$"),
        ({"blocks.1.extra": torch.ones(1)}, r"holds what the network has not: blocks.1.extra$"),
        (
            {"blocks.1.attn.proj.bias": torch.ones(3)},
            r"another shape of blocks.1.attn.proj.bias \(\(3,\), expected \(64,\)\)",
        ),
    ):
        file = bare_file({k: v for k, v in (good | change).items() if v is not None})
        words = ["convert", str(file), str(tmp_path / "x"), "--to", "latentddae"]
        assert cli.run([*words, "--objective", "ddpm", "--num-heads", "4"]) in (65, 78)
        with pytest.raises(Exception, match=f"(?s){message}"):
            convert(*words[1:], "--objective", "ddpm", "--num-heads", "4")
        assert not (tmp_path / "x").exists()


def test_publish_writes_weights_config_and_card(bare_file, tmp_path) -> None:
    file = bare_file(golden("dit_a_weights"))
    words = [str(file), "--to", str(tmp_path / "small"), "--objective", "ddpm", "--num-heads", "4"]
    publish_command.main(words)
    files = {"README.md", "config.json", "ema.safetensors"}
    assert {path.name for path in (tmp_path / "small").iterdir()} == files
    card = (tmp_path / "small" / "README.md").read_text()
    assert "CC-BY-NC-4.0" in card and "sd-vae-ft-ema" in card and "- depth: 3" in card
    assert zoo.load(tmp_path / "small").info["project"] == "DiT"
    with pytest.raises(ConfigError, match="exists already"):
        publish_command.main(words)


MEASURE = """
import resource, sys, time
from latentddae.models.convert import convert
start = time.monotonic()
convert.main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"MEASURED {time.monotonic() - start:.1f} {peak:.2f}")
"""


def measured(*words: object) -> tuple[float, float]:
    """Seconds and peak memory (GiB) of a conversion in a process of its own."""
    command = [sys.executable, "-c", MEASURE, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.rpartition("MEASURED ")[2].split()
    return float(seconds), float(peak)


@pytest.mark.slow
def test_xl_2_converts_in_a_minute_and_6_gb(tmp_path) -> None:
    model = zoo.build("dit_xl_2")
    state = model.state_dict()
    assert sum(value.numel() for value in state.values()) == XL_2_PARAMETERS
    torch.save(state, tmp_path / "xl.pt")
    del model
    numbers = [
        measured(tmp_path / "xl.pt", tmp_path / "ours", "--to", "latentddae", "--objective=ddpm"),
        measured(tmp_path / "ours", tmp_path / "theirs", "--to", "diffusers"),
        measured(tmp_path / "theirs", tmp_path / "x.pt", "--to", "dit", "--objective=ddpm"),
    ]
    print(numbers)
    again = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert all(seconds <= 60 and peak <= 6 for seconds, peak in numbers), numbers
