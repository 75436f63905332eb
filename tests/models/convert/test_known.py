"""A table of hashes beside checkpoints says what files do not."""

import json

import pytest

from latentddae.core.errors import ConfigError
from latentddae.core.files import sha256
from latentddae.diffusion.flow import Flow
from latentddae.models import zoo

from .conftest import golden


def test_a_table_beside_the_file_says_what_it_does_not(bare_file) -> None:
    path = bare_file(golden("sit_a_weights"))
    table = path.parent / "known_checkpoints.json"
    entry = {"objective": "flow", "time": "data", "num_heads": 4, "licence": "X-1", "source": "us"}
    table.write_text(json.dumps({"0" * 64: {"objective": "ddpm"}, sha256(path): entry}))
    checkpoint = zoo.load(path)
    assert checkpoint.objective == Flow(time="data") and checkpoint.model.config.num_heads == 4
    assert (checkpoint.info["licence"], checkpoint.info["source"]) == ("X-1", "us")
    assert checkpoint.info["known_by"] == str(table)
    with pytest.raises(ConfigError, match=r"has time=data by .*known_checkpoints.json, given was"):
        zoo.load(path, time="noise")
    path = bare_file(golden("dit_a_weights"))  # another file is not known
    with pytest.raises(ConfigError, match="give --objective ddpm"):
        zoo.load(path, num_heads=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no table"),
        ('{"HASH": "flow"}', "is no table"),
        ('{"HASH": {"objektive": "flow"}}', "objektive is unknown; an entry has objective, time"),
        ('{"HASH": {"num_heads": 0}}', "num_heads must be positive"),
        ("{", "known_checkpoints.json"),
    ],
)
def test_tables_that_are_none_are_refused(bare_file, content, message) -> None:
    path = bare_file(golden("sit_a_weights"))
    table = path.parent / "known_checkpoints.json"
    table.write_text(content.replace("HASH", sha256(path)))
    with pytest.raises(Exception, match=message) as raised:
        zoo.load(path, num_heads=4 if "num_heads" not in content else None)
    assert raised.value.exit_code in (65, 78)  # type: ignore[attr-defined]
