"""Tars of class folders, or of one class each, without labels: read as the folders they were."""

from collections.abc import Sequence
from pathlib import Path

from latentddae.core.errors import ConfigError
from latentddae.data.sources.imagenet import canonical_classes
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.scan import Tree, add_member, extension_of, join
from latentddae.data.sources.source import Item
from latentddae.data.sources.split_names import split_of_file, split_of_folder
from latentddae.data.sources.tars import Member, members
from latentddae.data.sources.webdataset import tars_by_split

LABELLED = (".cls", ".json")
Archive = tuple[Path, Path, list[Member]]


def unpacked_tree(
    tree: Tree, tars: Sequence[tuple[Path, Path]], options: SourceOptions, splits: bool = True
) -> Tree | None:
    """Tars (path, plain bytes) as the tree of folders that was packed into them; None if they are
    WebDataset shards.

    They are folders if no image has a label beside it, and every image is in a folder (of several
    tars: in several folders) or the tars are classes. ConfigError where both are possible.
    """
    archives: list[Archive] = []
    links: list[str] = []
    for tar, packed in tars:
        inside = []
        for member in members(packed, on_link=links.append):
            if extension_of(member.name) in LABELLED:
                return None
            inside.append(member)
        archives.append((tar, packed, inside))
    names = [member.name for _, _, inside in archives for member in inside]
    if any(".." in name.split("/") or name.startswith("/") for name in names):
        return None
    named = len(tars) > 1 and _are_classes(tree, archives, options)
    by_split = tars_by_split(tree, [tar for tar, _ in tars]) if splits and not named else {}
    top_of = {tar: split for split, paths in by_split.items() for tar in paths}
    if named:
        top_of = {tar: join(_split_folder(tree, tar), _stem(tar)) for tar, _, _ in archives}
    merged = _merged(tree, archives, top_of, options)
    folders = set(merged.images)
    if not folders or folders & {"", *by_split} or (len(tars) > 1 and len(folders) == 1):
        return None
    for link in links:
        merged.reject_link(link)
    merged.files |= tree.files  # lists of classes, label files
    merged.others += tree.others
    merged.notes += tree.notes
    return merged


def _merged(
    tree: Tree, archives: Sequence[Archive], top_of: dict[Path, str], options: SourceOptions
) -> Tree:
    root = archives[0][0] if len(archives) == 1 else tree.root
    merged = Tree(tree.name, root, members={})
    assert merged.members is not None
    for tar, packed, inside in archives:
        top = top_of.get(tar, "")
        for member in inside:
            path = join(top, _below_split(member.name, top))
            if path in merged.members:
                raise ConfigError(
                    f"{tree.name}: {path} is in {tar.name} and in another tar, too; say --layout "
                    f"webdataset to read them as shards without labels"
                )
            item = Item(path, -1, str(packed), member.offset, member.size)
            add_member(merged, path, item, options.skip)
    return merged


def _are_classes(tree: Tree, archives: Sequence[Archive], options: SourceOptions) -> bool:
    """Whether each tar is the class that it is named after: cat.tar, dog.tar. ConfigError if it
    could be a shard as well."""
    if any("/" in member.name.removeprefix("./") for _, _, inside in archives for member in inside):
        return False
    stems = [_stem(tar) for tar, _, _ in archives]
    if canonical_classes(stems) is not None or options.layout == "classes":
        return True
    if not any(any(map(str.isdigit, stem)) or split_of_file(stem) for stem in stems):
        raise ConfigError(
            f"{tree.name}: are {', '.join(sorted(stems)[:5])} classes or shards without labels? "
            f"say --layout classes or --layout webdataset"
        )
    return False


def _stem(tar: Path) -> str:
    return tar.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")


def _split_folder(tree: Tree, tar: Path) -> str:
    parts = tar.relative_to(tree.root).parts[:-1] if tar.is_relative_to(tree.root) else ()
    return next((part for part in parts if split_of_folder(part)), "")


def _below_split(name: str, split: str) -> str:
    """A member's path below the folder in the tar that repeats the tar's split."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    for place, part in enumerate(parts[:-1]):
        if split and split_of_folder(part) == split:
            return "/".join(parts[place + 1 :])
    return "/".join(parts)
