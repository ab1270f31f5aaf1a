"""What the benchmarks share: a training run on one core, where it ran, and memory."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

__all__ = ["machine", "peak_resident", "reset_peak", "run_command"]


def run_command(arguments: list[str], log: Path) -> bool:
    """``python -m clp_lightning`` on one core, its output in ``log``; False where it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    one_core = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "clp_lightning", *arguments]
    with log.open("w") as stream:
        run = subprocess.run(command, stdout=stream, stderr=stream, env={**os.environ, **one_core})
    return not run.returncode


def machine() -> str:
    """Number of cores and their model; with AMX bfloat16 is another world."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        models = [line for line in text.splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
        name += " with AMX" if "amx_tile" in text else ""
    return f"{os.cpu_count()} cores of {name}"


def reset_peak() -> int:
    """Gives free memory back and forgets the process's peak; what is resident now, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_resident() -> int:
    """The most that the process has had in memory since, in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: the CPU is measured on Linux only.")
