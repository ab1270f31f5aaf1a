"""The layers of the package, and the size of its files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_LINES = 350


def test_layers() -> None:
    # A process of its own, because import-linter switches every logger off that there is.
    code = "from importlinter.cli import lint_imports_command as main; main(['--no-cache'])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_no_file_is_long() -> None:
    folders = ("clp_lightning", "tests", "benchmarks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert lengths
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}
