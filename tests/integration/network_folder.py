"""One folder that two machines have mounted, here by sshfs twice: locks that hold and locks that do not.

No part of the test suite (its name has no test_). As root on Debian, with FUSE in the kernel:

    apt-get install --no-install-recommends sshfs openssh-sftp-server
    python -m pytest -s tests/integration/network_folder.py

sshfs talks to a server process of its own; no SSH is needed. NFS, whose client is part of the
kernel, is not tried out here.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.store import manifest
from pipeline.store.mounts import private_locks
from tests.pipeline.store.machines import builder, step
from tests.pipeline.store.test_store import wait_for

UNCACHED = "dir_cache=no,attr_timeout=0,entry_timeout=0"  # the leases of this test last 2 seconds


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    if shutil.which("sshfs") is None:
        pytest.fail("sshfs is not installed; the first lines of this file say how")
    served, server = tmp_path / "served", tmp_path / "server"
    served.mkdir()
    server.write_text("#!/bin/sh\nexec /usr/lib/openssh/sftp-server\n")
    server.chmod(0o700)
    with ExitStack() as stack:
        places = tmp_path / "one", tmp_path / "other"
        for place in places:
            place.mkdir()
            options = f"ssh_command={server},{UNCACHED}"
            subprocess.run(["sshfs", "-o", options, f"x:{served}", str(place)], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", str(place)], check=True)
        yield places


def test_leases_hold_and_outlive_a_killed_machine(
    mounts: tuple[Path, Path], tmp_path: Path
) -> None:
    one, other = (place / "store" for place in mounts)
    side, cache = tmp_path / "side", tmp_path / "unused"
    victim = builder(str(one), cache, "lease", side, 60)
    wait_for(side)
    follower = builder(str(other), cache, "lease", side, 0.5)
    time.sleep(6)
    assert side.read_text() == "built\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    out, log = follower.communicate(timeout=120)
    assert out == "False whole\n", log
    assert side.read_text() == "built\n" * 2
    assert builder(str(one), cache, "lease", side, 0).communicate(timeout=60)[0] == "True whole\n"


def test_file_locks_do_not_hold_which_is_said_and_costs_a_build(
    mounts: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = (FileLock(place / "x.lock") for place in mounts)
    with first.acquire(timeout=0), second.acquire(timeout=0):
        assert private_locks(mounts[0]) == "fuse.sshfs"
    side, cache = tmp_path / "side", tmp_path / "unused"
    both = [builder(str(place / "store"), cache, "auto", side, 3) for place in mounts]
    done = [process.communicate(timeout=60) for process in both]
    assert side.read_text() == "built\n" * 2
    for out, log in done:
        assert out.endswith("whole\n") and "locks hold on this machine only" in log
    for place in mounts:
        manifest.verified(place / "store/demo" / step().key(), full=True)
        assert not list(place.glob("store/*/.tmp-*"))
