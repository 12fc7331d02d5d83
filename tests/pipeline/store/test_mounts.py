"""Whether the locks of a folder hold against other machines, by what /proc/self/mountinfo says of it."""

from pathlib import Path

import pytest

from pipeline.store.mounts import private_locks

HEAD = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:35 / /tmp rw - tmpfs tmpfs rw,size=1g
"""
NFS = "rw,vers=3,hard,nolock,local_lock=all,addr=10.0.0.1"


def line(point: str, kind: str, options: str) -> str:
    return f"{HEAD}90 22 0:50 / {point} rw,noatime shared:9 - {kind} server:/export {options}\n"


@pytest.mark.parametrize(
    ("mounts", "why"),
    [
        (HEAD, None),
        ("", None),
        (line("/data", "nfs4", "rw,vers=4.2,hard,local_lock=none"), None),
        (line("/data", "nfs", "rw,vers=3,hard,local_lock=none"), None),
        (line("/data", "nfs", NFS), "nfs with nolock"),
        (line("/data", "nfs", "rw,vers=3,local_lock=flock"), "nfs with local_lock=flock"),
        (
            line("/data", "nfs", "rw,vers=3,local_lock=posix"),
            None,
        ),  # flock(2) is the one that is used
        (line("/data", "cifs", "rw,nobrl"), "cifs with nobrl"),
        (line("/data", "fuse.sshfs", "rw,user_id=0"), "fuse.sshfs"),
        (line("/data/st\\040ore", "nfs", NFS), None),
        (line("/database", "nfs", NFS), None),
        (line("/data/store", "nfs", NFS), "nfs with nolock"),
        (line("/data", "nfs", NFS) + "91 90 8:2 / /data rw - ext4 /dev/sdb rw\n", None),  # on top
    ],
)
def test_private_locks(mounts: str, why: str | None) -> None:
    assert private_locks(Path("/data/store/.locks"), mounts) == why


def test_this_machine() -> None:
    assert private_locks(Path("/proc")) is None
