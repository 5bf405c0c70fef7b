"""Every function that reads text of the policy or of a tool takes time in proportion to it, whatever the text is.

Each is timed on a text of a kind that is bad for it, and on one four times as long: linear code needs about four times the
time, quadratic code sixteen times.
"""

import time

import pytest

from appo_jax.reward.latex import last_boxed

SHORT, FACTOR, ALLOWED = 20_000, 4, 8  # characters; allowed: twice what linear code needs
AT_ONCE = 0.02  # seconds: whatever the long text needs, it is nothing to worry about

HOSTILE = {
    "open boxes": r"\boxed{",
    "boxes without braces": r"\boxed ",
    "closed boxes": r"\boxed{1}",
    "open braces": "{",
    "closing braces": "}",
    "backslashes": "\\",
    "spaces": " ",
}
READERS = {"last_boxed": last_boxed}


def seconds(function, text):
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        function(text)
        best = min(best, time.process_time() - began)
    return best


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_four_times_the_text_takes_about_four_times_the_time(reader, kind):
    function, piece = READERS[reader], HOSTILE[kind]
    short = piece * (SHORT // len(piece))
    first = seconds(function, short)
    assert first < 1
    assert seconds(function, short * FACTOR) < max(AT_ONCE, ALLOWED * first)
