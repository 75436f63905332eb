"""Folders of images: split folders, class folders, or neither."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentddae.core.errors import ConfigError, LatentddaeError
from latentddae.data.sources import imagenet
from latentddae.data.sources.ambiguities import (
    check_common_classes,
    check_inner_splits,
    check_parallel,
    check_spelling,
)
from latentddae.data.sources.listing import ALL, Listing
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.scan import Tree, join
from latentddae.data.sources.source import Item
from latentddae.data.sources.split_names import split_of_folder

CLASSES = ("auto", "folders", "imagenet1k")
"""How class folders are numbered. folders: in their natural order; imagenet1k: by the 1,000 ids of
ImageNet in canonical order; auto: imagenet1k if all folders are among those ids, else folders."""
OUTSIDE, ABOVE = "outside the split folders", "above the folders that name classes"


def wrappers(tree: Tree) -> list[str]:
    """Folders from the root down to the one that matters: while there is one folder with images
    only, and it holds more of them."""
    chain = [""]
    while True:
        inside, names = tree.below(chain[-1]), tree.children(chain[-1])
        # A folder that holds images itself is a class and no wrapper.
        if "" in inside or len(names) != 1 or split_of_folder(names[0]) or names[0] in inside:
            return chain
        chain.append(join(chain[-1], names[0]))


def split_folders(tree: Tree, top: str, layout: str) -> dict[str, str]:
    """Split -> its folder in the tree; {} if there are no splits. ConfigError if two readings are
    possible."""
    names = tree.children(top)
    splits = {name: split_of_folder(name) for name in names}
    named = [name for name in names if splits[name]]
    if layout in ("classes", "flat") or not named:
        if layout == "splits":
            raise ConfigError(f"{tree.name}: no folder with images is named after a split")
        return {}
    below = tree.below(top)
    flat = {name for name in names if all(f == name for f in below if f.split("/")[0] == name)}
    if layout == "auto" and len(named) < len(names):
        if len(named) == 1 and flat == set(names):
            return {}  # car, train, boat
        raise ConfigError(
            f"{join(tree.name, top)}: are {', '.join(sorted(names)[:8])} classes or splits? say "
            f"--layout classes or --layout splits"
        )
    folders: dict[str, str] = {}
    for name in named:
        split = splits[name]
        assert split is not None
        if split in folders:
            raise ConfigError(
                f"{tree.name}: {Path(folders[split]).name} and {name} are both named after the "
                f"split {split}; rename one, or say --layout classes"
            )
        folders[split] = join(top, name)
    return folders


@dataclass
class Group:
    """The folders of one split."""

    split: str
    top: str
    """Its folder in the tree."""
    folders: dict[str, list[str]]
    """Folder below `top` -> names of images."""

    @property
    def is_flat(self) -> bool:
        return set(self.folders) <= {""}


def folder_listing(tree: Tree, options: SourceOptions) -> Listing:
    """Images in class folders, perhaps below split folders, or in none. ConfigError where two
    readings are possible."""
    top = wrappers(tree)[-1]
    if top:
        tree.notes.append(f"read from its folder {top}")
    splits = split_folders(tree, top, options.layout)
    listing = Listing(tree, "", {})
    listing.uses = ("layout", "labels", "relabel", "skip_extensions")
    groups = [Group(split, folder, tree.below(folder)) for split, folder in splits.items()]
    if not splits:
        groups = [Group(ALL, top, tree.below(top))]
    inside = sum(len(names) for group in groups for names in group.folders.values())
    outside = sum(map(len, tree.images.values())) - inside
    if outside and splits:
        if options.layout != "splits":
            raise ConfigError(
                f"{tree.name}: {outside} images lie beside the split folders "
                f"{', '.join(splits.values())}; move them, or say --layout splits to leave them out"
            )
        listing.reject(OUTSIDE, tree.name, outside)
    labelled = [g for g in groups if not g.is_flat and options.layout != "flat"]
    if labelled:
        listing.uses += ("class_level", "classes")
    kind = "class folders" if labelled else "images without class folders"
    listing.layout = f"{kind} below split folders" if splits else kind
    names = _class_names(tree, labelled, options, listing)
    for group in groups:
        listing.origins[group.split] = str(tree.root / group.top)
        _list_group(listing, group, names if group in labelled else {}, options)
    if options.layout == "auto":
        check_common_classes(listing)
    return listing


def _class_names(
    tree: Tree, groups: Sequence[Group], options: SourceOptions, listing: Listing
) -> dict[str, str]:
    """Folder below a split -> the name of its class; sets the listing's classes."""
    if not groups:
        return {}
    depths: Counter[int] = Counter()
    for group in groups:
        for folder, images in group.folders.items():
            depths[folder.count("/") + 1 if folder else 0] += len(images)
    listing.depth = ", ".join(f"{d} ({count:,} images)" for d, count in sorted(depths.items()))
    if options.layout == "auto":
        folders = [folder for group in groups for folder in group.folders]
        check_inner_splits(tree, folders)
        check_parallel(tree, {folder.split("/")[0] for folder in folders})
    level = class_level(tree, groups, depths, options)
    prefix_of: dict[str, str] = {}
    for group in groups:
        for folder in group.folders:
            parts = folder.split("/") if folder else []
            count = level or len(parts)
            if parts and len(parts) >= count:
                prefix_of[folder] = "/".join(parts[:count])
    prefixes = set(prefix_of.values())
    last = {prefix: prefix.rsplit("/", 1)[-1] for prefix in prefixes}
    unique = len(set(last.values())) == len(prefixes)
    names = {folder: last[p] if unique else p for folder, p in prefix_of.items()}
    if options.classes != "folders":
        check_spelling(tree, set(names.values()))
    listing.classes, listing.numbering = class_list(
        tree.root, natural_order(set(names.values())), options.classes
    )
    where = "the folder that holds the image" if not level else f"folder {level} below the split"
    listing.labels = "names of folders" if level == 1 else f"names of folders: {where}"
    return names


def class_level(
    tree: Tree, groups: Sequence[Group], depths: Counter[int], options: SourceOptions
) -> int:
    """Which folder below a split names the class: 1, 2, ...; 0: the one that holds the image."""
    text = options.class_level
    if text in ("first", "leaf") or text.isdecimal():
        level = {"first": 1, "leaf": 0}.get(text)
        return int(text) if level is None else level
    if text != "auto":
        raise ConfigError(f"class_level is {text!r}, allowed: auto, first, leaf or a number")
    counts = ", ".join(f"{count} images {d} deep" for d, count in sorted(depths.items()))
    if len(depths) > 1:
        if options.layout == "classes" and set(depths) == {0, 1}:
            return 1
        raise ConfigError(
            f"{tree.name}: images lie at several depths ({counts}): choose --class-level first, "
            f"leaf or a number, or give the folder that holds the classes"
        )
    (depth,) = depths
    inner = {folder.split("/", 1)[1] for g in groups for folder in g.folders if "/" in folder}
    if depth == 1 or len(inner) == 1:  # CLASS/images/IMAGE has one reading
        return 1
    example = next(folder for g in groups for folder in g.folders if "/" in folder)
    raise ConfigError(
        f"{tree.name}: which folder of {example} names the class ({counts})? choose --class-level "
        f"first, leaf or a number"
    )


def _list_group(
    listing: Listing, group: Group, names: dict[str, str], options: SourceOptions
) -> None:
    """List the images of one split."""
    tree = listing.tree
    if group.is_flat and any(map(imagenet.VAL_IMAGE.fullmatch, group.folders.get("", ()))):
        _list_flat_val(listing, group)
        return
    label_of = {name: label for label, name in enumerate(listing.classes)}
    paths: dict[str, list[str]] = {}
    for folder, images in group.folders.items():
        if names and folder not in names:
            _reject_above(listing, group, folder, len(images))
            continue
        paths.setdefault(names.get(folder, ""), []).extend(join(folder, name) for name in images)
    items: list[Item] = []
    for name in natural_order(paths):
        label = label_of.get(name, -1) if names else -1
        items += [tree.item(join(group.top, path), path, label) for path in sorted(paths[name])]
    listing.items[group.split] = items


def _reject_above(listing: Listing, group: Group, folder: str, count: int) -> None:
    listing.reject(ABOVE, join(listing.tree.name, join(group.top, folder)), count)


def _list_flat_val(listing: Listing, group: Group) -> None:
    """The flat val images of ImageNet, with the ground truth found near them."""
    tree, images = listing.tree, group.folders[""]
    every = {name: tree.item(join(group.top, name), name, -1) for name in images}
    listing.items[group.split] = list(every.values())
    try:
        folder = tree.root / group.top if tree.members is None else tree.root.parent
        items, where = imagenet.label_val(tree.name, every, folder)
    except LatentddaeError as error:
        listing.errors[group.split] = error
        return
    listing.items[group.split] = items
    listing.classes, listing.numbering = imagenet.wnids(), "as in ImageNet-1k"
    listing.layout = f"{listing.layout}; val images of ImageNet"
    listing.labels = where if listing.labels == "none" else f"{listing.labels}; val: {where}"


def class_list(
    root: Path | str, folders: Sequence[str], classes: str
) -> tuple[tuple[str, ...], str]:
    """The class names in the order of their labels, for folders in natural order; and that order
    in words."""
    if classes not in CLASSES:
        raise ConfigError(f"classes is {classes!r}, allowed: {', '.join(CLASSES)}")
    natural = "in natural order of the names (2 before 10)"
    if classes == "folders":
        return tuple(folders), natural
    canonical = imagenet.canonical_classes(folders)
    if classes == "imagenet1k" and canonical is None:
        raise ConfigError(f"{root}: not all its folders are ids of ImageNet-1k")
    if canonical is None:
        return tuple(folders), natural
    return tuple(canonical), f"as in ImageNet-1k ({len(folders)} of its 1,000 ids)"


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted with numbers by their value: 2 before 10."""

    def pieces(name: str) -> list[tuple[int, int, str]]:
        split = [piece for piece in re.split(r"([0-9]+)", name) if piece]
        return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in split]

    return sorted(names, key=pieces)
