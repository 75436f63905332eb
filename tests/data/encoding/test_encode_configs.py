"""The shipped configurations are valid, and each opens with its command."""

from pathlib import Path

import pytest

from latentddae.core.command import parse
from latentddae.data.encoding.encode import EncodeSplitsConfig

FILES = sorted((Path(__file__).parents[3] / "configs" / "encode").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# latentddae encode --config configs/encode/{path.name} ")
    arguments = parse(EncodeSplitsConfig, ["--config", str(path), *first.split()[5:]])
    config = arguments.record(EncodeSplitsConfig)
    assert config.out.startswith("data/")
