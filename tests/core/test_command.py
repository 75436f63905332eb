"""Command lines: flags, files and key=value say the same thing; help names every setting."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from latentddae.core import config as configuration
from latentddae.core.command import Command, command_line, options
from latentddae.core.config import choice, option, positional, transient
from latentddae.core.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True)
class Data:
    shorthand: ClassVar[str] = "path"

    path: str
    """Folder of shards."""
    workers: int = 1
    """Reading threads."""


@dataclass(frozen=True, kw_only=True)
class Net:
    kind: ClassVar[str] = "net"

    width: int = 8
    """Channels."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Probe a network."""

    runs: tuple[Path, ...] = positional(())
    """Run folders."""
    out: str = option(alias="folder")
    """Folder for results."""
    data: Data
    model: Any = choice(lambda: {"net": Net, "big": Net(width=64)}, Net)
    """Network."""
    noise_samples: int = 1
    """Noises averaged
    per sample."""
    levels: tuple[float, ...] = (0.1, 0.2)
    """Noise levels."""
    noisy_input: bool = True
    """Whether the input has noise."""
    retry: bool = transient(False)
    """Start again."""
    metric: Literal["top1", "mean"] = "top1"
    """What accuracy means."""
    limit: int | None = None
    """Most samples."""
    extra: dict[str, float] = field(default_factory=dict)
    """Options of a sampler."""

    def __post_init__(self) -> None:
        configuration.require(self, positive=("noise_samples",))


def read(*argv: str) -> Settings:
    seen: list[Settings] = []
    Command("toy", Settings, run=seen.append, plan=str).main(list(argv))
    return seen[0]


MINIMUM = ("--out", "o", "--data", "d")


def test_flags_settings_and_file_agree(tmp_path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(
        "out: o\ndata: {path: d, workers: 3}\nmodel: {name: big, width: 5}\nnoise_samples: 4\n"
        "levels: [0.3, 0.4]\nnoisy_input: false\nmetric: mean\nlimit: 7\nextra: {churn: 2}\n"
    )
    flags = read(
        *MINIMUM, "--data.workers=3", "--model", "big", "--model.width", "5",
        "--noise-samples", "4",
        "--levels", "0.3", "--levels", "0.4", "--no-noisy-input", "--metric", "mean", "--limit=7",
        "--extra", "churn=2",
    )  # fmt: skip
    settings = read(
        "out=o", "data=d", "data.workers=3", "model=big", "model.width=5", "noise_samples=4",
        "levels=0.3,0.4", "noisy_input=false", "metric=mean", "limit=7", "extra.churn=2",
    )  # fmt: skip
    assert flags == settings == read("--config", str(file))
    assert flags.model == Net(width=5) and flags.extra == {"churn": 2.0}


def test_later_arguments_win_and_the_file_comes_first(tmp_path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text("out: file\ndata: {path: file, workers: 9}\n")
    got = read("out=a", "--config", str(file), "--out", "b", "--data", "d")
    assert (got.out, got.data) == ("b", Data(path="d", workers=9))


def test_positional_arguments_alias_and_the_launchers_rank() -> None:
    got = read("a", "b", "--folder", "o", "--data", "d", "--local_rank=3", "--retry")
    assert (got.runs, got.out, got.retry) == ((Path("a"), Path("b")), "o", True)
    assert "retry" not in configuration.to_dict(got)


@pytest.mark.parametrize(
    ("argv", "error", "parts"),
    [
        (("--noise-sample", "3"), UsageError, ["--noise-sample", "did you mean --noise-samples?"]),
        (("--data.worker", "3"), UsageError, ["did you mean --data.workers?"]),
        (("noise_sample=3",), ConfigError, ["noise_sample", "did you mean noise_samples?"]),
        (("--model.widht", "3"), ConfigError, ["model.widht", "did you mean model.width?"]),
        (("--limit",), UsageError, ["--limit needs a value"]),
        (("--limit", "--retry"), UsageError, ["--limit needs a value"]),
        (("--limit", "many"), ConfigError, ["limit", "expected int", "many"]),
        (("--config", ""), UsageError, ["--config names no file"]),
        (("--metric", "top2"), ConfigError, ["metric", "top1, mean"]),
        (("--noise-samples", "0"), ConfigError, ["noise_samples must be positive, got 0"]),
        (("--extra", "churn"), UsageError, ["--extra takes NAME=VALUE"]),
        (("--no-metric",), UsageError, ["unknown option --no-metric"]),
    ],
)
def test_bad_command_lines_say_what_is_wrong(argv, error, parts) -> None:
    with pytest.raises(error) as caught:
        read(*MINIMUM, *argv)
    for part in parts:
        assert part in str(caught.value)


def test_missing_settings_are_named_by_their_flags() -> None:
    with pytest.raises(UsageError, match="missing --out"):
        read("--data", "d")
    with pytest.raises(UsageError, match=r"missing --data\.path"):
        read("--out", "o", "--data.workers", "3")


def test_help_names_every_setting_with_meaning_and_default(capsys) -> None:
    Command("toy", Settings, run=print, plan=str).main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for setting in options(Settings):
        assert setting.doc in text and setting.doc
    for part in (
        "--noise-samples INT Noises averaged per sample. (default: 1)",
        "--data.path TEXT Folder of shards. (required)",
        "--model NAME Network. (default: net; one of net, big)",
        "--levels FLOAT,... Noise levels. (default: 0.1,0.2)",
        "--noisy-input / --no-noisy-input",
        "--metric {top1,mean}",
        "--out TEXT (or --folder)",
        "--dry-run",
    ):
        assert part in text


def test_print_config_reads_back_and_dry_run_does_nothing(tmp_path, capsys) -> None:
    done: list[Settings] = []
    command = Command("toy", Settings, run=done.append, plan=lambda settings: f"to {settings.out}")
    command.main([*MINIMUM, "--print-config", "levels=1,2"])
    file = tmp_path / "toy.yaml"
    file.write_text(capsys.readouterr().out)
    assert read("--config", str(file)) == read(*MINIMUM, "levels=1,2")
    command.main([*MINIMUM, "--dry-run"])
    assert capsys.readouterr().out == "to o\n" and not done


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("runs/a", "runs/b c", "--levels", "0.3", "--no-noisy-input", "--retry"),
        ("--model", "big", "--extra", "churn=2", "--extra", "steps=3", "--data.workers", "3"),
        ("--levels", "", "--limit", "7", "--metric", "mean", "--data", "with space"),
    ],
)
def test_a_record_is_typed_as_it_was_read(argv) -> None:
    command = Command("toy", Settings, run=print, plan=str)
    record = read(*MINIMUM, *argv)
    program, name, *words = shlex.split(command_line(command, record))
    assert (program, name) == ("latentddae", "toy")
    assert read(*words) == record


def test_only_what_differs_from_the_defaults_is_typed() -> None:
    command = Command("toy", Settings, run=print, plan=str)
    assert command_line(command, read(*MINIMUM)) == "latentddae toy --out o --data.path d"
