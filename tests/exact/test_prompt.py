from __future__ import annotations

import pytest

from clp_lightning import ExactPromptText, ExactTask, Preference


@pytest.mark.parametrize(
    ("stop", "text"),
    # 0.25 is 8.75 of 35 (two digits of 6 tokens), or 6 of 24 (without the stop token); 0.4 is 14 or
    # 9.6.
    [(False, "b d c c "), (True, "b b c a ")],
)
def test_the_preference_in_two_digits_each(stop: bool, text: str) -> None:
    task = ExactTask(stop=stop)
    preference = Preference.single([0.25, 0.75], 0.4)
    assert ExactPromptText(task).rewrite("c d", preference) == f"{text}c d"
