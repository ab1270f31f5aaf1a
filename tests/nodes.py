"""Two machines on one: network namespaces with a cable between them (iproute2, as root)."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.devices import Job, run_jobs

ROOT = Path(__file__).parents[1]
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def can_have_namespaces() -> bool:
    """Whether this process may make network namespaces."""
    if shutil.which("ip") is None:
        return False
    name = f"clp-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        _ip("netns", "del", name)
    return made


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)


@contextmanager
def two_nodes() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that see each other and nothing else."""
    names = (f"clp-a-{os.getpid()}", f"clp-b-{os.getpid()}")
    try:
        for name in names:
            _ip("netns", "add", name)
        ends = ("netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        _ip("link", "add", "cable", *ends)
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def fit_command(args: list[str]) -> list[str]:
    """``configs/cluster/torchrun.sh`` with these arguments, one process on each of two nodes."""
    more = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    return ["bash", str(ROOT / "configs/cluster/torchrun.sh"), *args, *more]


def jobs_command(jobs: list[Job], folder: Path) -> list[str]:
    """torchrun with the jobs of ``tests.devices``, which a file in ``folder`` names."""
    (folder / "jobs").write_bytes(pickle.dumps((jobs, folder, "ddp")))
    torchrun = (
        'torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29500" '
        '--rdzv-id=jobs --rdzv-conf="$RDZV_CONF" -m tests.nodes "$0"'
    )
    return ["bash", "-c", torchrun, str(folder / "jobs")]


class Node:
    """A command in a namespace, one process on it.

    Args:
        number: Which of the two; the first holds the rendezvous.
        name: Its namespace.
        log: Where it writes.
        command: What it runs.
        settings: Further environment variables.
    """

    def __init__(
        self, number: int, name: str, log: Path, command: list[str], **settings: str
    ) -> None:
        environment = {
            "NODES": "2",
            "GPUS": "1",
            "HEAD": ADDRESSES[0],
            # Which torchrun would find out by the machine's name; both have the same here.
            "RDZV_CONF": f"is_host={1 - number}",
            "PET_LOCAL_ADDR": ADDRESSES[number],
            "GLOO_SOCKET_IFNAME": "cable",
            "TP_SOCKET_IFNAME": "cable",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with log.open("a") as stream:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                stdout=stream,
                stderr=stream,
                env=os.environ | environment | settings,
                start_new_session=True,
            )

    def kill(self) -> None:
        """As a machine that loses power: torchrun and its workers, at once."""
        # The workers have sessions of their own.
        for pid in (*_descendants(self.process.pid), self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self, timeout: float) -> int:
        """Its exit status."""
        return self.process.wait(timeout)


def _descendants(pid: int) -> list[int]:
    """Children first seen; read from the kernel (Linux)."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(below for child in found for below in _descendants(child))]


if __name__ == "__main__":
    run_jobs(*pickle.loads(Path(sys.argv[1]).read_bytes()))
