"""Parquet and Arrow files as the Hugging Face `datasets` library writes them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.sources.open import open_split
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.source import Source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog"]


def table(images: list[bytes | None], labels: list[int | None], **columns: list) -> "pa.Table":
    features = {"label": {"names": NAMES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    rows = [None if image is None else {"bytes": image, "path": "x.jpg"} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    made = {"image": pa.array(rows, kind), "label": pa.array(labels, pa.int64()), **columns}
    return pa.table(made).replace_schema_metadata(metadata)


def opened(source: Path, split: str = "train", **options: str) -> Source:
    return open_split(SourceOptions(source=str(source), **options), split)  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_parquet_in_splits(photos: Path, tmp_path: Path, compression: str) -> None:
    paths = sorted(photos.glob("*/*.jpg"))
    images = [path.read_bytes() for path in paths]
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    labels = [i % 2 for i in range(20)]
    for number, part in enumerate((slice(0, 10), slice(10, 20))):
        name = f"train-{number:05d}-of-00002-abc.parquet"
        made = table(images[part], labels[part])
        pq.write_table(made, folder / name, compression=compression, row_group_size=4)
    pq.write_table(table(images[20:], [None] * 10), folder / "validation-00000-of-00001.parquet")
    train, val = opened(tmp_path / "set"), opened(tmp_path / "set", "val")
    assert (train.classes, val.classes) == (("cat", "dog"), ("cat", "dog"))
    assert (train.labels.tolist(), set(val.labels.tolist())) == (labels, {-1})
    assert [train.read(i) for i in range(20)] == images[:20]
    with Image.open(paths[25]) as image:
        np.testing.assert_array_equal(np.asarray(val.image(5)), np.asarray(image))
    assert len({*train.keys, *val.keys}) == 30
    with pytest.raises(ConfigError, match="no split 'test'"):
        opened(tmp_path / "set", "test")


@pytest.mark.parametrize("stream", [True, False])
def test_arrow(photos: Path, tmp_path: Path, stream: bool) -> None:
    images: list[bytes | None] = [p.read_bytes() for p in sorted(photos.glob("1/*.jpg"))]
    images[3] = None
    (folder := tmp_path / "set").mkdir()
    made, path = table(images, [1] * 10), folder / "data-00000-of-00001.arrow"
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), made.schema) as writer:
        writer.write_table(made, max_chunksize=3)
    for place in (path, folder):
        source = opened(place)
        assert (len(source), source.classes, set(source.labels.tolist())) == (9, tuple(NAMES), {1})
        assert source.rejected == (("data-00000-of-00001.arrow/0000003", "the image is null"),)
        assert source.read(3) == images[4]


def test_columns_with_two_readings(photos: Path, tmp_path: Path) -> None:
    image = next(photos.glob("1/*.jpg")).read_bytes()
    path = tmp_path / "t.parquet"
    pq.write_table(table([image], [0], fine_label=[7]), path)
    with pytest.raises(ConfigError, match="--labels COLUMN"):
        opened(path)
    assert opened(path, labels="label").labels.tolist() == [0]
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(ConfigError, match="which column holds the images"):
        opened(path)


LABELS = {  # column -> (labels, classes)
    "texts": (pa.array(["dog", "cat", None, "cat10", "cat2"]), [3, 0, -1, 2, 1]),
    "categories": (pa.array(["b", "a", None, "b", ""]).dictionary_encode(), [1, 0, -1, 1, -1]),
    "floats of pandas": (pa.array([1.0, 0.0, float("nan"), 2.0, None]), [1, 0, -1, 2, -1]),
    "bytes": (pa.array([1, 0, None, 2, 2], pa.int8()), [1, 0, -1, 2, 2]),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_every_type(photos: Path, tmp_path: Path, name: str) -> None:
    images = [path.read_bytes() for path in sorted(photos.glob("*/*.jpg"))[:5]]
    column, expected = LABELS[name]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": pa.array(images), "species": column, "w": [1] * 5}), path)
    source = opened(path)
    assert source.labels.tolist() == expected
    assert source.report is not None
    assert source.report.labels == "column species"
    assert source.report.notes == ("columns that are not read: w",)
    assert set(opened(path, labels="none").labels.tolist()) == {-1}
    with pytest.raises(ConfigError, match="--labels x is no column of integers or texts"):
        opened(path, labels="x")


def test_columns_that_cannot_hold_labels_stop(photos: Path, tmp_path: Path) -> None:
    image = next(photos.glob("1/*.jpg")).read_bytes()
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": pa.array([image]), "label": [[1, 2]]}), path)
    with pytest.raises(ConfigError, match="which column holds the labels, label"):
        opened(path)
    pq.write_table(pa.table({"image": pa.array([image]), "label": [0.5]}), path)
    with pytest.raises(DataError, match=r"0\.5 is neither an integer nor a text"):
        opened(path)
    data = bytearray(path.read_bytes())
    data[10:60] = bytes(50)
    path.write_bytes(data)
    with pytest.raises(DataError):
        opened(path)
