"""Parquet and Arrow files with images in a column, as the Hugging Face `datasets` library has them.

The images' bytes are put end to end into a temporary file, because compressed columns cannot be
read at random.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import json_value
from latentddae.data.sources.archives import spool
from latentddae.data.sources.folders import natural_order
from latentddae.data.sources.listing import ALL, Listing, number_ids
from latentddae.data.sources.options import IGNORE, SourceOptions
from latentddae.data.sources.scan import Tree
from latentddae.data.sources.source import Item
from latentddae.data.sources.split_names import split_of_file, split_of_folder
from latentddae.data.sources.tables import LABEL_NAMES

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNAR = (".parquet", ".arrow")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "pixels")
BATCH_ROWS = 256
NULL = object()  # label of a row without an image
Label = int | str | None


def columnar_listing(
    tree: Tree, files: Sequence[Path], options: SourceOptions, splits: bool = True
) -> Listing:
    """All images of these files, in splits by the names of the files or of their folders."""
    uses = ("labels", "relabel", "split_file", *(["layout"] if options.layout != "auto" else []))
    listing = Listing(tree, "images in columns (parquet, arrow)", {}, uses=uses)
    rows: list[object] = []
    names: tuple[str, ...] | None = None
    label_column, unread = "", dict[str, None]()
    for path in files:
        split = _split(tree, path) if splits else ALL
        schema, batches = read_batches(path)
        image, label_column = _columns(path, schema, options)
        unread |= dict.fromkeys(n for n in schema.names if n not in (image, label_column))
        names = names or class_label_names(schema, label_column)
        items = listing.items.setdefault(split, [])
        sizes: list[int] = []
        spooled = spool(path.name, _Values(batches, image, label_column).images(sizes, rows))
        offset = 0
        for row, size in enumerate(sizes):
            if size < 0:
                listing.missing.setdefault(split, []).append(
                    (f"{path.name}/{row:07d}", "the image is null")
                )
                continue
            items.append(Item(f"{path.stem}/{row:07d}", -1, str(spooled), offset, size))
            offset += size
    if len(listing.items) > 1 and ALL in listing.items:
        raise ConfigError(
            f"{tree.name}: only some of its files are named after a split; give those of one "
            f"split by a pattern, e.g. part-{{000..012}}.parquet"
        )
    _number(listing, [row for row in rows if row is not NULL], names, options)
    if listing.classes:
        listing.labels = f"column {label_column}"
    if unread:
        tree.notes.append(f"columns that are not read: {', '.join(unread)}")
    listing.origins = {split: f"{tree.root}#{split}" for split in listing.items}
    listing.add_found(sum(map(len, listing.items.values())))
    return listing


def _number(
    listing: Listing, values: list[object], names: tuple[str, ...] | None, options: SourceOptions
) -> None:
    """Number the labels of the items, which are integers, or texts that are names of classes."""
    place = listing.tree.name
    texts = sorted({value for value in values if isinstance(value, str)})
    if texts:
        listing.classes = tuple(natural_order(texts))
        position = {name: label for label, name in enumerate(listing.classes)}
        numbers = [position.get(str(value), -1) for value in values]
        listing.numbering = "in natural order of the names (2 before 10)"
    else:
        ids = [value if isinstance(value, int) else None for value in values]
        numbers, classes, numbering = number_ids(ids, names, options.relabel, place)
        if any(number >= 0 for number in numbers):
            listing.classes, listing.numbering = classes, numbering
    label = iter(numbers)
    for split, items in listing.items.items():
        listing.items[split] = [replace(item, label=next(label)) for item in items]


class _Values:
    """The rows of some batches: images one after the other, sizes and labels into lists."""

    def __init__(self, batches: "Iterator[pa.RecordBatch]", image: str, label: str) -> None:
        self._batches, self._image, self._label = batches, image, label

    def images(self, sizes: list[int], labels: list[object]) -> Iterator[bytes]:
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


def _label(value: object) -> Label:
    """A value of a label column; None, an empty text and not-a-number are no label."""
    if value is None or isinstance(value, int):
        return None if value is None else int(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if value.is_integer():
            return int(value)
    if isinstance(value, str):
        return value.strip() or None
    raise DataError(f"the label {value!r} is neither an integer nor a text")


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
            return file.schema_arrow, _guarded(path, file.iter_batches(batch_size=BATCH_ROWS))
        source = pa.memory_map(str(path))
        try:
            stream = pa.ipc.open_stream(source)
            return stream.schema, _guarded(path, iter(stream))
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
            every = map(reader.get_batch, range(reader.num_record_batches))
            return reader.schema, _guarded(path, every)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _guarded(path: Path, batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
    """The same rows; DataError where the file is damaged."""
    import pyarrow as pa

    try:
        yield from batches
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
        raise ConfigError(
            f"{path}: which column holds the images, {', '.join(schema.names)}? one of binary "
            f"values, or of structs with `bytes`, is read; rename it to `image`"
        )
    usable = [field.name for field in schema if _is_label(field.type)]
    image, chosen = (named or images)[0], options.labels
    if chosen == IGNORE:
        return image, ""
    if chosen:
        if chosen not in usable:
            raise ConfigError(
                f"{path}: --labels {chosen} is no column of integers or texts; there are: "
                f"{', '.join(usable)}"
            )
        return image, chosen
    labels = [name for name in schema.names if name.lower() in LABEL_NAMES and name != image]
    if len(labels) > 1 or any(name not in usable for name in labels):
        raise ConfigError(
            f"{path}: which column holds the labels, {', '.join(labels)}? say --labels COLUMN, or "
            f"--labels {IGNORE}"
        )
    return image, labels[0] if labels else ""


def _is_label(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):  # pandas' categories
        kind = kind.value_type
    tests = (types.is_integer, types.is_floating, types.is_string, types.is_large_string)
    return any(test(kind) for test in tests)


def class_label_names(schema: "pa.Schema", column: str) -> tuple[str, ...] | None:
    """Names of classes that `datasets` has put into a schema's metadata."""
    try:
        metadata = json_value((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, metadata["info"]["features"][column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _split(tree: Tree, path: Path) -> str:
    folders = path.relative_to(tree.root).parts[:-1] if path.is_relative_to(tree.root) else ()
    named = [split for split in map(split_of_folder, folders) if split]
    return named[0] if named else split_of_file(path.stem) or ALL
