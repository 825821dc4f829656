"""samples.md read back: the same prompts with the answers before and after training."""

from __future__ import annotations

import re

MAX_SAMPLES = 5
MAX_CHARACTERS = 1500
FENCE = re.compile(r"`{3,}")


def parse_samples(text: str) -> list[dict[str, str]]:
    """prompt, before and after of each sample; what is missing is left out, long texts are cut."""
    found: list[dict[str, str]] = []
    which, fence, lines = "", "", []
    for line in text.splitlines():
        if fence and line != fence:
            lines.append(line)
        elif fence:
            if found and which:
                found[-1][which] = _cut("\n".join(lines))
            fence, lines = "", []
        elif FENCE.fullmatch(line):
            fence = line
        elif line.startswith("## "):
            found.append({"prompt": _cut(line[3:])})
        elif line in ("Before:", "After:"):
            which = line[:-1].lower()
    return found[:MAX_SAMPLES]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
