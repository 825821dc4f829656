"""Where the config tree lies."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

CONF_DIR: Path = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""Absolute: `llama_lab/conf` in an installed wheel, `conf` beside the package in a checkout."""
