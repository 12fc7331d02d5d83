"""A one-node Slurm that this script starts: a sweep, `hydra/launcher=submitit_slurm`, and one conversion.

No part of the test suite (its name has no test_). As root on Debian, with nothing else of Slurm running:

    apt-get install --no-install-recommends slurm-wlm munge
    python -m pip install -c constraints.txt -e .[dev,slurm]
    python -m pytest -s tests/integration/slurm.py

Neither systemd nor cgroups are needed; configuration, state and logs are in a temporary folder.
"""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.pipeline.conftest import Finished

CONF = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Authentication, controller and node, each in the foreground; `SLURM_CONF` for all commands."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    ports = {"controller": free_port(), "node": free_port()}
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host(), **ports))
    munge = {"socket": "munge.socket", "key-file": key.name}
    munge |= {part: f"munge.{part}" for part in ("pid-file", "log-file", "seed-file")}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("SLURM_CONF", str(conf))
        options = [f"--{option}={folder / name}" for option, name in munge.items()]
        for daemon in (
            ["munged", "--foreground", "--force", *options],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-c", "-N", host()],
        ):
            log = stack.enter_context((folder / f"{daemon[0]}.out").open("w"))
            process = subprocess.Popen(daemon, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(stop, process)
            time.sleep(1)
        stack.callback(until_idle, folder)  # no job outlives the test, even one that failed
        stack.callback(asked, "scancel", "--signal=KILL", "--state=RUNNING", "--user=root")
        stack.callback(asked, "scancel", "--state=PENDING", "--user=root")
        until_idle(folder)
        yield folder


def host() -> str:
    return socket.gethostname().partition(".")[0]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(30)


def until_idle(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while "idle" not in asked("sinfo", "--noheader", "-o", "%t"):
        logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.out"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.5)


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_a_sweep_of_three_slurm_jobs(cluster: Path, sweep: Callable[..., Finished]) -> None:
    options = ("cpus_per_task=1", "mem_gb=3")
    sweep("hydra/launcher=submitit_slurm", *(f"hydra.launcher.{option}" for option in options))
    jobs = asked("scontrol", "show", "job", "--oneliner")
    states = re.findall(r"JobId=(\d+) .*?JobState=(\w+) .*?RunTime=(\S+)", jobs)
    print("\n".join("job {} {} in {}".format(*state) for state in states))
    assert [state for _, state, _ in states] == ["COMPLETED"] * 3


def test_two_slurm_jobs_share_a_conversion(cluster: Path, shared: Callable[..., None]) -> None:
    shared("runtime.engine=slurm", "runtime.cluster={cpus_per_task: 1, mem_gb: 3}")
    jobs = asked("scontrol", "show", "job", "--oneliner")
    states = re.findall(r"JobId=(\d+) JobName=spiking-llm .*?JobState=(\w+)", jobs)
    assert [state for _, state in states][-2:] == ["COMPLETED"] * 2
