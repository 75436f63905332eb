"""Trees of small pictures and other files, for the tests of sources."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentddae.core.errors import ConfigError
from latentddae.data.sources.open import open_split
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.source import Source

Files = Mapping[str, bytes | str]


def picture(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, *paths: str, files: Files | None = None) -> Path:
    """A tree of pictures, each another one, and of other files."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture(number))
    for path, content in (files or {}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def tar_of(members: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def opened(root: Path | str, split: str = "train", **options: Any) -> Source:
    """A split; checks that every image is counted once and can be read."""
    source = open_split(SourceOptions(source=str(root), **options), split)
    report = source.report
    assert report is not None
    assert report.found == report.listed + sum(report.rejected.values())
    assert len(set(source.keys)) == len(source.keys) == len(source.labels)
    for i in range(len(source)):
        assert source.image(i).mode == "RGB"
    return source


def labels(source: Source) -> dict[str, str]:
    """Key -> name of its class; "" without a label."""
    names = [source.classes[label] if label >= 0 else "" for label in source.labels]
    return dict(zip(source.keys, names, strict=True))


def refused(root: Path | str, flag: str, split: str = "train", **options: Any) -> None:
    with pytest.raises(ConfigError, match=flag):
        open_split(SourceOptions(source=str(root), **options), split)
