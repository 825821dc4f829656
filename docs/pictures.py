"""Draws docs/images/study.svg: what a finished study prints when its command is typed again.

python docs/pictures.py outputs/lora_quant search=lora_quant     # the study's folder, and the words that made it
"""

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGE = Path(__file__).resolve().parent / "images" / "study.svg"
WIDTH = 118


def main(folder: str, words: list[str]) -> None:
    """Run the command, which ends at once, and keep its last screen."""
    command = [sys.executable, "-m", "llama_lab", "-m", f"hydra.sweep.dir={folder}", *words]
    env = os.environ | {"COLUMNS": str(WIDTH)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text(done.stdout.replace(f"{Path(folder).resolve()}", f"outputs/{Path(folder).name}")))
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_text(console.export_svg(title="python -m llama_lab -m " + " ".join(words)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
