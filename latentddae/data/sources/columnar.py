"""Parquet and Arrow files with images in a column, as the Hugging Face `datasets` library has them.

The images' bytes are put end to end into a temporary file, because compressed columns cannot be
read at random.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.sources.archives import spool
from latentddae.data.sources.folders import split_of_file, split_of_folder
from latentddae.data.sources.listing import ALL, Listing, number_ids
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.scan import Tree
from latentddae.data.sources.source import Item

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNAR = (".parquet", ".arrow")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "pixels")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")
BATCH_ROWS = 256


def columnar_listing(tree: Tree, files: Sequence[Path], options: SourceOptions) -> Listing:
    """All images of these files, in splits by the names of the files or of their folders."""
    listing = Listing(tree, "images in columns (parquet, arrow)", {})
    ids: list[int | None] = []
    names: tuple[str, ...] | None = None
    label_column = ""
    for path in files:
        split = _split(tree, path)
        schema, batches = read_batches(path)
        image, label_column = _columns(path, schema, options)
        names = names or class_label_names(schema, label_column)
        items = listing.items.setdefault(split, [])
        sizes: list[int] = []
        spooled = spool(path.name, _Values(batches, image, label_column).images(sizes, ids))
        offset = 0
        for row, size in enumerate(sizes):
            if size < 0:
                listing.missing.setdefault(split, []).append(
                    (f"{path.name}/{row:07d}", "the image is null")
                )
                continue
            items.append(Item(f"{path.stem}/{row:07d}", -1, str(spooled), offset, size))
            offset += size
    ids = [label for label in ids if label != NULL]
    numbers, classes, numbering = number_ids(ids, names, options.relabel, tree.name)
    position = iter(numbers)
    for split, items in listing.items.items():
        listing.items[split] = [
            Item(i.path, next(position), i.file, i.offset, i.size) for i in items
        ]
        listing.origins[split] = f"{tree.root}#{split}"
    if any(number >= 0 for number in numbers):
        listing.classes, listing.numbering = classes, numbering
        listing.labels = f"column {label_column}"
    if len(listing.items) > 1 and ALL in listing.items:
        raise ConfigError(f"{tree.name}: only some of its files are named after a split")
    listing.add_found(sum(map(len, listing.items.values())))
    return listing


NULL = -(2**62)  # label of a row without an image


class _Values:
    """The rows of some batches: images one after the other, sizes and labels into lists."""

    def __init__(self, batches: "Iterator[pa.RecordBatch]", image: str, label: str) -> None:
        self._batches, self._image, self._label = batches, image, label

    def images(self, sizes: list[int], labels: list[int | None]) -> Iterator[bytes]:
        """The images' bytes; -1 is the size of a row without any."""
        for batch in self._batches:
            column = batch.column(self._image)
            data = column
            if hasattr(column, "flatten") and hasattr(
                column, "field"
            ):  # a struct of bytes and path
                data = column.flatten()[column.type.get_field_index("bytes")]
            count = len(batch)
            values = batch.column(self._label).to_pylist() if self._label else [None] * count
            for value, label in zip(data, values, strict=True):
                buffer = value.as_buffer() if value.is_valid else None
                sizes.append(-1 if buffer is None else buffer.size)
                labels.append(NULL if buffer is None else _label(label))
                if buffer is not None:
                    yield memoryview(buffer)  # type: ignore[misc]


def _label(value: object) -> int | None:
    if value is None or isinstance(value, int):
        return value
    raise DataError(f"the label {value!r} is no integer")


def read_batches(path: Path) -> "tuple[pa.Schema, Iterator[pa.RecordBatch]]":
    """The schema and the rows of a file. ConfigError without pyarrow, DataError if damaged."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the package pyarrow: pip install 'latentddae[parquet]'"
        ) from error
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            return file.schema_arrow, file.iter_batches(batch_size=BATCH_ROWS)
        source = pa.memory_map(str(path))
        try:
            stream = pa.ipc.open_stream(source)
            return stream.schema, iter(stream)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
            return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _columns(path: Path, schema: "pa.Schema", options: SourceOptions) -> tuple[str, str]:
    """The columns of the images and of the labels ("": none)."""
    import pyarrow as pa

    def is_image(kind: "pa.DataType") -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    images = [field.name for field in schema if is_image(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in images]
    if not images or (len(images) > 1 and len(named) != 1):
        raise ConfigError(f"{path}: which column holds the images, {', '.join(schema.names)}?")
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    chosen = options.labels.rpartition(":")[2]
    if chosen and chosen != "none":
        if chosen not in integers:
            raise ConfigError(f"{path}: {chosen!r} is no column of integers: {integers}")
        return (named or images)[0], chosen
    labels = [name for name in LABEL_COLUMNS if name in integers] if not chosen else []
    if len(labels) > 1:
        raise ConfigError(f"{path}: which column holds the labels? say --labels COLUMN: {labels}")
    return (named or images)[0], labels[0] if labels else ""


def class_label_names(schema: "pa.Schema", column: str) -> tuple[str, ...] | None:
    """Names of classes that `datasets` has put into a schema's metadata."""
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, metadata["info"]["features"][column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _split(tree: Tree, path: Path) -> str:
    folders = path.relative_to(tree.root).parts[:-1] if path.is_relative_to(tree.root) else ()
    named = [split for split in map(split_of_folder, folders) if split]
    return named[0] if named else split_of_file(path.stem) or ALL
