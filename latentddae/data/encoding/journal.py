"""The journal of an unfinished encoding, `OUT/.encode-SPLIT/`.

It holds the plan's settings and an entry for each complete shard, and is deleted when the manifest
has been written.
"""

import shutil
from pathlib import Path
from typing import cast

from latentddae.core.config import differences
from latentddae.core.errors import ConfigError
from latentddae.core.files import read_checked_json, sha256, warn, write_checked_json
from latentddae.core.retry import retried
from latentddae.data.encoding.plan import Plan
from latentddae.data.manifest import ShardEntry
from latentddae.data.shard_format import index_path, shard_name


class Journal:
    """What has been written of a plan so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.out = plan, Path(plan.config.out)
        self.folder = self.out / f".encode-{plan.config.split}"

    def start(self) -> None:
        """Record the plan's settings. ConfigError if an unfinished encoding has other ones."""
        path = self.folder / "plan.json"
        if path.exists():
            begun = read_checked_json(path, "plan of an encoding", by_hand=False)
            changed = differences(begun, self.plan.settings)
            if changed:
                raise ConfigError(
                    f"{self.out} holds an unfinished encoding with other settings: "
                    f"{describe_changes(changed)}; continue with the old ones, or remove {self.out}"
                )
        else:
            write_checked_json(path, self.plan.settings)
        for stale in [*self.folder.glob("failed-*"), *self.out.glob(".tmp-*")]:
            stale.unlink()

    def discard_damaged(self) -> None:
        """Forget the shards of an earlier start that are not what was written: they are encoded
        again."""
        for shard, entry in enumerate(self.entries()):
            if entry is None:
                continue
            tar = self.out / f"{self.name(shard)}.tar"
            recorded = (entry["sha256"], entry["index_sha256"])
            if (sha256(tar), sha256(index_path(tar))) != recorded:
                warn(f"warning: {tar} is damaged and will be encoded again")
                self.path(shard).unlink()

    def name(self, shard: int) -> str:
        """A shard's file name without extension."""
        return shard_name(self.plan.config.split, shard)

    def path(self, shard: int) -> Path:
        """The file that says that a shard is complete."""
        return self.folder / f"{self.name(shard)}.json"

    def record(self, shard: int, entry: ShardEntry) -> None:
        """Enter a complete shard."""
        write_checked_json(self.path(shard), entry)

    def entry(self, shard: int) -> ShardEntry | None:
        """The entry of a shard whose files are there in full, else None."""
        path = self.path(shard)
        if not path.exists():
            return None
        entry = cast(ShardEntry, read_checked_json(path, "journal of an encoding", by_hand=False))
        tar = self.out / f"{self.name(shard)}.tar"
        complete = tar.exists() and tar.stat().st_size == entry["bytes"]
        return entry if complete and index_path(tar).exists() else None

    def entries(self) -> list[ShardEntry | None]:
        """The entries of all shards, see `entry`."""
        return [self.entry(shard) for shard in range(self.plan.shards)]

    def unfinished(self) -> list[int]:
        """Numbers of the shards that have yet to be written."""
        return [shard for shard, entry in enumerate(self.entries()) if entry is None]

    def bad_images(self) -> list[tuple[str, str]]:
        """Images left out so far: (name, reason)."""
        return [
            (name, reason)
            for entry in self.entries()
            if entry is not None
            for name, reason in entry["bad"]
        ]

    def mark_failed(self, rank: int) -> None:
        """Tell the other ranks that this one has given up."""
        mark = self.folder / f"failed-{rank}"
        retried(mark.touch, mark)

    def any_failed(self) -> bool:
        """Whether a rank has given up."""
        return any(self.folder.glob("failed-*"))

    def discard_if_empty(self) -> None:
        """Delete the journal if it has no shard yet."""
        if not any(self.folder.glob(f"{self.plan.config.split}-*.json")):
            self.delete()

    def delete(self) -> None:
        """Delete the journal; the shards stay."""
        shutil.rmtree(self.folder, ignore_errors=True)


def describe_changes(changed: dict[str, tuple]) -> str:
    """Settings that differ, in words."""
    return ", ".join(f"{key} was {old}, now {new}" for key, (old, new) in changed.items())
