"""Which file systems are trusted to keep their files as they are."""

import pytest

from latentddae.core.mounts import file_system, is_local
from latentddae.data import shards

MOUNTS = """\
overlay / overlay rw 0 0
/dev/sda1 /data ext4 rw 0 0
server:/x /data/shared nfs4 rw 0 0
tmpfs /data/shared/fast tmpfs rw 0 0
lustre@o2ib:/l /my\\040lustre lustre rw 0 0
garbage /fuse fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind", "local"),
    [
        ("/data/set", "ext4", True),
        ("/data/sharedset", "ext4", True),
        ("/data/shared", "nfs4", False),
        ("/data/shared/a/b", "nfs4", False),
        ("/data/shared/fast/a", "tmpfs", True),
        ("/my lustre/set", "lustre", False),
        ("/fuse/x", "fuse.sshfs", False),
        ("/other", "overlay", True),
    ],
)
def test_the_longest_mount_decides(path, kind, local, tmp_path):
    (tmp_path / "mounts").write_text(MOUNTS)
    assert file_system(path, tmp_path / "mounts") == kind
    assert is_local(path, tmp_path / "mounts") is local
    assert is_local(path, tmp_path / "no such file")


@pytest.mark.parametrize("local", [True, False])
def test_shards_are_mapped_where_they_are_local(local, tiny_shards, monkeypatch):
    monkeypatch.setattr(shards, "is_local", lambda root: local)
    opened = shards.ShardSet(tiny_shards, "test")
    assert bool(opened._maps) is local
    assert bool(opened._files) is not local
