"""All commands have one command line: flags, files and key=value agree, help is complete."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from safetensors.torch import load_file

from latentddae import cli
from latentddae.core import config
from latentddae.core.command import Command, Option, default_text, help_text, options, parse
from latentddae.core.errors import ConfigError, LatentddaeError, UsageError, run_command
from latentddae.models.zoo import CheckpointHints

GOLDEN = Path(__file__).parent / "golden"
MODULES = {name: module for name, (module, _) in cli.COMMANDS.items()}
CELL = {"block": "1", "level": "0.2"}
NEEDED = {  # what a command needs beside the settings without a default
    "compare-curve": {"reference": "x"},
    "fid": {"samples": "x", "reference": "y"},
    "knn": CELL,
    "linear": CELL,
    "preview": {"out": "x.png"},
    "suite": {"data": "x"},
    "visualize": CELL,
}
STATED = CheckpointHints(objective="flow", time="data", num_heads=4)
SAMPLES: dict[Any, str] = {str: "x", Path: "x", int: "1", float: "0.5", bool: "true"}


def command_of(name: str) -> Command[Any]:
    command = importlib.import_module(MODULES[name]).COMMAND
    assert command.name == name
    return command


@pytest.fixture(params=sorted(MODULES))
def command(request) -> Command[Any]:
    return command_of(request.param)


def sample(option: Option) -> str:
    """A value that the option takes, as text: its default, else something of its type."""
    if option.default not in (dataclasses.MISSING, None, (), {}, ""):
        return default_text(option).removeprefix("default: ").partition("; one of")[0]
    hint = next(
        part for part in (get_args(option.hint) or (option.hint,)) if part is not type(None)
    )
    if get_origin(option.hint) is tuple:
        hint = get_args(option.hint)[0]
    if get_origin(option.hint) is Literal:
        return str(get_args(option.hint)[0])
    return SAMPLES.get(hint, "1")


def required(command: Command[Any]) -> dict[str, str]:
    missing = (o for o in options(command.config) if o.default is dataclasses.MISSING)
    return {o.name: sample(o) for o in missing} | NEEDED.get(command.name, {})


def test_every_setting_has_a_meaning_and_stands_in_help(command) -> None:
    text = " ".join(help_text(command).split())
    for option in options(command.config):
        assert option.doc, f"{command.name}: {option.name} has no docstring"
        assert f"{option.doc} ({default_text(option)})" in text
    assert (command.config.__doc__ or "").split()[0] in text
    assert not (command.config.__doc__ or "").startswith(f"{command.config.__name__}(")


def test_flags_settings_and_files_agree(command, tmp_path) -> None:
    """Every setting that has a default, set to it in three ways beside the required ones."""
    values = required(command)
    for option in options(command.config):
        if option.default not in (dataclasses.MISSING, None, (), {}, ""):
            values[option.name] = sample(option)
    flags = [
        word for name, text in values.items() for word in (f"--{name.replace('_', '-')}", text)
    ]
    tree: dict[str, Any] = {}
    for name, text in values.items():
        config.put(tree, name, text)
    file = tmp_path / "settings.yaml"
    file.write_text(config.yaml.safe_dump(tree))
    one, two, three = (
        parse(command.config, argv).record(command.config)
        for argv in (
            flags,
            [f"{name}={text}" for name, text in values.items()],
            ["--config", str(file)],
        )
    )
    assert one == two == three


def test_print_config_reads_back(command, tmp_path, capsys) -> None:
    words = [f"{name}={text}" for name, text in required(command).items()]
    command.main([*words, "--print-config"])
    file = tmp_path / "settings.yaml"
    file.write_text(capsys.readouterr().out)
    again = parse(command.config, ["--config", str(file)]).record(command.config)
    assert again == parse(command.config, words).record(command.config)


def test_a_misspelt_flag_names_the_nearest(command) -> None:
    fixed = {o.name for o in options(command.config) if o.names}  # whose fields depend on a choice
    plain = (o for o in options(command.config) if o.name.split(".")[0] not in fixed)
    option = max(plain, key=lambda option: len(option.name))
    with pytest.raises(UsageError, match=f"did you mean {option.flag}"):
        parse(command.config, [f"{option.flag}x", "1"])


def reads_a_checkpoint(name: str) -> bool:
    return "checkpoint" in {option.name for option in options(command_of(name).config)}


@pytest.fixture(params=[name for name in sorted(MODULES) if reads_a_checkpoint(name)])
def reader(request) -> Command[Any]:
    """A command that takes `--checkpoint`."""
    return command_of(request.param)


def test_what_a_foreign_file_does_not_tell_is_a_flag(reader, tiny_shards, tmp_path) -> None:
    """Every command that reads a checkpoint refuses a bare file of SiT and names the flag."""
    torch.save(load_file(GOLDEN / "sit_a_weights.safetensors"), tmp_path / "sit.pt")
    values = required(reader) | {"checkpoint": str(tmp_path / "sit.pt")}
    for name in ("data", "data.path"):
        if name in values:
            values[name] = str(tiny_shards)
    words = [f"{name}={value}" for name, value in values.items()]
    with pytest.raises(ConfigError, match="give --objective ddpm") as refused:
        reader.main([*words, "--num-heads", "4", "--dry-run"])
    assert "--objective flow with --time data (SiT)" in str(refused.value)
    with pytest.raises(ConfigError, match="give --num-heads"):
        reader.main([*words, "--objective", "flow", "--time", "data", "--dry-run"])
    command = parse(reader.config, [*words, "--objective=flow", "--time=data", "--num-heads=4"])
    assert command.record(reader.config).hints == STATED


OPENED_LATER = {"block", "halflife", "samples"}
"""Settings whose range the opened checkpoint or data decide."""


def numbers_of(option: Option) -> set[type]:
    parts = [option.hint, *get_args(option.hint)]
    parts += [inner for part in parts for inner in get_args(part)]
    return {part for part in parts if part in (int, float)}


def test_numbers_that_cannot_be_meant_are_refused(command) -> None:
    """Not finite, below zero, of more than 63 bits: every setting of every command."""
    base = [f"{name}={value}" for name, value in required(command).items()]
    if command.name == "linear":
        base.append("recipe=ddae")

    def is_refused(option: Option, value: str) -> bool:
        try:
            parse(command.config, [*base, f"{option.name}={value}"]).record(command.config)
        except LatentddaeError:
            return True
        return False

    def takes_text(option: Option) -> bool:
        return str in (option.hint, *get_args(option.hint))

    for option in options(command.config):
        kinds = numbers_of(option)
        if not kinds or option.name.rpartition(".")[2] in OPENED_LATER or takes_text(option):
            continue
        for value in ("-1", "-inf", "inf", "1e39", "nan", "9" * 30):
            expected = value != "9" * 30 or float not in kinds
            assert is_refused(option, value) or not expected, (option.name, value)


@pytest.mark.parametrize(
    "argv",
    [
        ["model.mlp_ratio=1e300"],
        ["model.depth=1000000000000000"],
        ["model.head_depth=1000000000000000"],
        ["model.head_width=1000000000000000"],
        ["model.head_width=6", "model.head_heads=1"],
        ["model={name: unet, blocks_per_level: 1000000000000000}", "objective=edm"],
    ],
)
def test_networks_that_no_memory_holds_are_refused(argv, tiny_shards, tmp_path, capfd) -> None:
    settings = [f"run={tmp_path / 'run'}", f"data.path={tiny_shards}", "total_images=64", *argv]
    main = importlib.import_module(MODULES["train"]).main
    assert run_command("train", main, [*settings, "--dry-run"]) == 78
    assert capfd.readouterr().err.count("\n") == 1


def test_settings_of_a_recipe_are_not_passed_over_by_lbfgs() -> None:
    linear = command_of("linear")
    base = [f"{name}={value}" for name, value in required(linear).items()]
    for argv in (["--lr", "1"], ["--epochs", "3"], ["--crop-padding", "0"]):
        with pytest.raises(UsageError, match="--recipe"):
            parse(linear.config, [*base, *argv]).record(linear.config)
        parse(linear.config, [*base, *argv, "--recipe", "ddae"]).record(linear.config)
