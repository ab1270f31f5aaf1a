"""``plan`` beside the kernel's mark of the highest resident memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.plan.measured import CONDITIONERS, MODELS

# Freed blocks go back to the kernel at once, so that the mark is what was in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("conditioner", CONDITIONERS)
@pytest.mark.parametrize("model", MODELS)
def test_within_15_percent_of_the_measured_peak(model: str, conditioner: str) -> None:
    command = [sys.executable, "-m", "tests.plan.measured", model, conditioner]
    run = subprocess.run(
        command, env=os.environ | MALLOC, stdout=subprocess.PIPE, check=True, text=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15), found
