"""Where locks of files do not hold against other machines, by how their folder is mounted.

Linux gives flock(2) on NFS to the server: as a lock of NFSv4 itself, as one of its lock manager with
NFSv3. `nolock` and `local_lock` keep it on the client, and so do most file systems in user space
(nfs(5), flock(2), mount.cifs(8)).
"""

from __future__ import annotations

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
# Options of a mount by the kind of its file system, one of which keeps locks on the client.
PRIVATE = {
    "nfs": ("nolock", "local_lock=all", "local_lock=flock"),
    "nfs4": ("nolock", "local_lock=all", "local_lock=flock"),
    "cifs": ("nobrl",),
    "smb3": ("nobrl",),
    "lustre": ("localflock",),
}
# File systems in user space that do not pass locks on.
USER_SPACE = (
    "sshfs",
    "s3fs",
    "rclone",
    "gcsfuse",
    "goofys",
    "mountpoint-s3",
    "blobfuse",
    "blobfuse2",
)


def private_locks(folder: Path, mounts: str | None = None) -> str | None:
    """What keeps the locks of a folder on this machine, as `nfs with local_lock=all`; None where nothing
    is known to."""
    if mounts is None:
        mounts = MOUNTS.read_text(errors="replace") if MOUNTS.exists() else ""
    kind, options = _mount(folder.resolve(), mounts)
    if kind.removeprefix("fuse.") in USER_SPACE:
        return kind
    keeping = [option for option in PRIVATE.get(kind, ()) if option in options]
    return f"{kind} with {keeping[0]}" if keeping else None


def _mount(folder: Path, mounts: str) -> tuple[str, set[str]]:
    """The kind of the file system that a folder is on, and the options of its mount: proc(5)."""
    best, found = -1, ("", set[str]())
    for line in mounts.splitlines():
        mounted, _, system = line.partition(" - ")
        fields, (kind, *rest) = mounted.split(), system.split() or [""]
        if len(fields) < 6 or len(rest) < 2:
            continue
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        if (
            folder.is_relative_to(point) and len(point.parts) >= best
        ):  # the last one hides the others
            best, found = len(point.parts), (kind, {*fields[5].split(","), *rest[1].split(",")})
    return found
