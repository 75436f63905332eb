"""On which kind of file system a path lies."""

import os
from pathlib import Path

LOCAL = frozenset(
    "ext2 ext3 ext4 xfs btrfs zfs f2fs jfs reiserfs bcachefs tmpfs ramfs overlay squashfs erofs "
    "iso9660 udf apfs hfs ufs".split()
)
"""File systems whose files do not change under a reader through another machine."""
MOUNTS = Path("/proc/self/mounts")


def file_system(path: Path | str, mounts: Path = MOUNTS) -> str:
    """The type of the file system that holds a path, as the kernel calls it; "" if it does not
    say."""
    target, kind, longest = f"{os.path.realpath(path)}/", "", 0
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        _, place, name, *_ = line.split(" ")
        place = place.replace("\\040", " ").rstrip("/") + "/"
        if target.startswith(place) and len(place) >= longest:  # a later mount hides an earlier one
            kind, longest = name, len(place)
    return kind


def is_local(path: Path | str, mounts: Path = MOUNTS) -> bool:
    """Whether a path lies on a disk of this machine, or nothing is known about it."""
    return file_system(path, mounts) in (*LOCAL, "")
