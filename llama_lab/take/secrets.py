"""Keys and tokens in what is about to leave the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

PATTERNS = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "an OpenAI key": re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    "a GitHub token": re.compile(rb"\bgh[pousr]_[A-Za-z0-9]{30,}"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
SECRET_NAMES = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD)$")
"""Environment variables whose values must not be sent."""
SHORTEST = 12
"""Characters of such a value, below which it may stand in a text by chance."""
TEXTS = (".json", ".jinja", ".md", ".txt", ".model", ".yaml")


def secrets_in(files: list[Path]) -> Iterator[tuple[Path, str]]:
    """Each file that holds a secret, and what it is; never the secret itself. Weights are not read."""
    values = {
        name: value.encode()
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name.upper()) and len(value) >= SHORTEST
    }
    for file in files:
        if file.suffix not in TEXTS:
            continue
        content = file.read_bytes()
        for what, pattern in PATTERNS.items():
            if pattern.search(content):
                yield file, what
        for name, value in values.items():
            if value in content:
                yield file, f"the value of {name}"
