"""What the benchmarks with a report share: a training run on one core, and where it ran."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

__all__ = ["machine", "run_command"]


def run_command(arguments: list[str], log: Path) -> bool:
    """``python -m clp_lightning`` on one core, its output in ``log``; False where it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    one_core = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "clp_lightning", *arguments]
    with log.open("w") as stream:
        run = subprocess.run(command, stdout=stream, stderr=stream, env={**os.environ, **one_core})
    return not run.returncode


def machine() -> str:
    """Number of cores and their model."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    return f"{os.cpu_count()} cores of {name}"
