"""Configuration: what is wrong is named by its dotted path; what is right survives a round trip."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import pytest

from latentddae.core import config as configuration
from latentddae.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Small:
    kind: ClassVar[str] = "small"
    width: int = 8


@dataclass(frozen=True, kw_only=True)
class Run:
    run: str
    images: int = 10
    limit: int | None = None
    flag: bool = False
    optim: Optim = field(default_factory=Optim)
    model: Any = configuration.choice(lambda: {"small": Small, "wide": Small(width=64)}, Small)


def load(*overrides: str) -> Run:
    return configuration.load(Run, None, ["run=r", *overrides])


def test_overrides_reach_nested_fields_with_their_types() -> None:
    run = load(
        "optim.lr=3e-4", "images=1e6", "limit=5", "optim.betas=[0.9,0.95]", "model.name=wide"
    )
    assert run.optim.lr == 3e-4
    assert run.images == 1_000_000 and isinstance(run.images, int)
    assert run.limit == 5
    assert run.optim.betas == (0.9, 0.95)
    assert run.model == Small(width=64)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ["optim.lrr", "optim.lr?"]),
        ("imagess=1", ["imagess", "images?"]),
        ("optim.lr=fast", ["optim.lr", "expected float", "'fast'"]),
        ("images=2.5", ["images", "expected int", "2.5"]),
        ("flag=3", ["flag", "expected bool"]),
        ("optim.lr=-1", ["optim.lr must be positive", "-1"]),
        ("optim.schedule=cosin", ["optim.schedule", "cosine"]),
        ("optim=3", ["optim", "mapping"]),
        ("optim.lr=.nan", ["optim.lr", "expected float"]),
        ("model.name=smal", ["model.name", "'smal'", "small"]),
        ("model={name: wide, widht: 3}", ["model.widht", "model.width?"]),
        ("optim.betas=[fast]", ["optim.betas[0]", "expected float"]),
        ("--fast", ["key=value"]),
    ],
)
def test_bad_values_name_path_and_remedy(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.exit_code == 78


def test_missing_required_key_is_named() -> None:
    with pytest.raises(ConfigError, match="missing required setting run"):
        configuration.load(Run, None, [])


def test_yaml_round_trip(tmp_path) -> None:
    run = load("optim.lr=3e-4", "model.name=wide", "limit=7")
    path = tmp_path / "run.yaml"
    path.write_text(configuration.to_yaml(run))
    assert configuration.load(Run, path, []) == run


def test_command_line_beats_file_beats_base(tmp_path) -> None:
    (tmp_path / "base.yaml").write_text("run: base\nimages: 1\noptim: {lr: 1.0e-3}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nimages: 2\n")
    run = configuration.load(Run, tmp_path / "top.yaml", ["optim.schedule=cosine"])
    assert (run.run, run.images, run.optim.lr, run.optim.schedule) == ("base", 2, 1e-3, "cosine")


@pytest.mark.parametrize(
    "text", ["a: [", "- 1\n- 2\n", "!!python/object/apply:os.system ['true']", "run: r\nrun: s\n"]
)
def test_files_that_are_not_plain_yaml_mappings_are_refused(tmp_path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        configuration.load(Run, path, ["run=r"])


@pytest.mark.parametrize("base", ["[a]", "{a: b}", "''"])
def test_a_base_that_is_no_file_is_refused(tmp_path, base) -> None:
    (tmp_path / "c.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match="must name a file"):
        configuration.read_file(tmp_path / "c.yaml")


def test_a_circle_is_seen_whatever_its_files_are_called(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text(f"base: ../{tmp_path.name}/c.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        configuration.read_file(tmp_path / "c.yaml")


def test_a_required_text_is_not_empty() -> None:
    with pytest.raises(ConfigError, match="run is empty"):
        load("run=")


@pytest.mark.parametrize("name", ["[small]", "{a: small}"])
def test_a_choice_has_a_name_of_text(name) -> None:
    with pytest.raises(ConfigError, match=r"model\.name: unknown"):
        configuration.build(
            Run, {"run": "r", "model": configuration.parse_yaml(f"name: {name}", "")}
        )


def test_circular_bases_are_refused(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        configuration.load(Run, tmp_path / "a.yaml", [])


def test_differences_list_changed_leaves() -> None:
    old, new = configuration.to_dict(load()), configuration.to_dict(load("optim.lr=1e-3"))
    assert configuration.differences(old, new) == {"optim.lr": (1e-4, 1e-3)}


@pytest.mark.parametrize(
    "text", ["007", "1e3", "@x", "[0.9,0.99", "a#b", "null", "${oc.env:HOME}", "yes"]
)
def test_text_settings_take_what_was_typed(tmp_path, text: str) -> None:
    assert load(f"run={text}").run == text
    path = tmp_path / "run.yaml"
    path.write_text(configuration.to_yaml(load(f"run={text}")))
    assert configuration.load(Run, path, []).run == text


def test_one_list_has_three_spellings(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim:\n  betas: [0.5, .75]\n")
    assert (
        load("optim.betas=[0.5, .75]").optim.betas
        == load("optim.betas=0.5,.75").optim.betas
        == configuration.load(Run, path, ["run=r"]).optim.betas
        == (0.5, 0.75)
    )


def test_a_choice_takes_a_name_and_fields_below_it(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: wide\n")
    assert load("model=wide", "model.width=3").model == Small(width=3)
    assert load("model={name: wide, width: 4}").model == Small(width=4)
    assert configuration.load(Run, path, ["run=r", "model.width=5"]).model == Small(width=5)
    assert configuration.load(Run, path, ["run=r", "model.name=small"]).model == Small()


def test_require_names_field_value_and_range() -> None:
    @dataclass(frozen=True)
    class Numbers:
        a: float | None = 1.0
        b: int = 0
        c: float = 0.5

        def __post_init__(self) -> None:
            configuration.require(self, positive=("a",), non_negative=("b",), fraction=("c",))

    assert Numbers(a=None) == Numbers(None)
    for wrong, message in (
        ({"a": 0.0}, "a must be positive, got 0.0"),
        ({"a": float("inf")}, "a must be positive, got inf"),
        ({"b": -1}, "b must be 0 or more, got -1"),
        ({"c": 1.0}, "c must lie between 0 and 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Numbers(**wrong)


def test_another_choice_starts_from_its_own_defaults(tmp_path) -> None:
    (tmp_path / "base.yaml").write_text("run: r\nmodel: {name: small, width: 3}\n")
    top = tmp_path / "top.yaml"
    top.write_text("base: base.yaml\nmodel: {name: wide}\n")
    assert configuration.load(Run, top).model == Small(width=64)
    top.write_text("base: base.yaml\nmodel: {name: small}\n")
    assert configuration.load(Run, top).model == Small(width=3)
    top.write_text("base: base.yaml\nmodel: {width: 5}\n")
    assert configuration.load(Run, top).model == Small(width=5)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")),
        "a: &a [*a]\n",
    ],
)
def test_aliases_that_stand_for_too_much_are_refused(tmp_path, text) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml: its aliases stand for more than"):
        configuration.read_file(tmp_path / "c.yaml")


def test_an_alias_is_what_it_stands_for() -> None:
    assert configuration.parse_yaml("a: &x [1]\nb: *x\n", "c") == {"a": ["1"], "b": ["1"]}
