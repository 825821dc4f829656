"""Draws the pictures of docs/comparing.md from the folder of a study: compare.svg, report.png and wandb.png.

python docs/pictures_compare.py outputs/lora_quant

wandb.png shows the plots that the study logged to W&B, read from the files of its offline run: W&B's own pages need an
account. Chromium draws both PNGs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.integration.browser import Browser  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WIDTH = 150
COLORS = 64
"""Of the PNGs, which are drawings: a quarter of the size."""
PLOTS = ("history", "parallel_coordinates", "pareto_front", "importance")
PAGE = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 8px; display: grid; gap: 8px;
grid-template-columns: 1fr 1fr }} div {{ height: 400px }}</style>{divs}<script>{plotly}</script><script>
const figures = {figures};
Promise.all(figures.map((f, at) => Plotly.newPlot('f' + at, f.data, {{...f.layout, height: 400, width: 690}},
  {{displayModeBar: false}}))).then(() => document.body.dataset.ready = 'yes')</script>"""
READY = "document.body && document.body.dataset.ready === 'yes'"


def main(study: Path) -> None:
    """Draw all three."""
    IMAGES.mkdir(exist_ok=True)
    words = ["compare", study.name]
    env = os.environ | {"COLUMNS": str(WIDTH), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llama_lab", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=study.parent)
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text("\n".join(line.rstrip() for line in done.stdout.splitlines())))
    (IMAGES / "compare.svg").write_text(console.export_svg(title=f"python -m llama_lab compare outputs/{study.name}"))
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        subprocess.run([*command, "--html", str(page)], check=True, capture_output=True, env=env, cwd=study.parent)
        plots = Path(scratch) / "plots.html"
        plots.write_text(wandb_plots(study), encoding="utf-8")
        browser = Browser(Path(scratch))
        try:
            for source, name in ((page, "report.png"), (plots, "wandb.png")):
                browser.open(source, READY)
                browser.picture(IMAGES / name)
        finally:
            browser.close()
    for name in ("report.png", "wandb.png"):
        shrink(IMAGES / name)


def wandb_plots(study: Path) -> str:
    """A page with the figures that the study's W&B run holds."""
    from plotly.offline import get_plotlyjs

    (files,) = study.glob("wandb/offline-run-*/files/media/plotly")
    found = [path for name in PLOTS for path in sorted(files.glob(f"{name}_*.json"))]
    figures = json.dumps([json.loads(path.read_text()) for path in found]).replace("</", "<\\/")
    divs = "".join(f'<div id="f{at}"></div>' for at in range(len(found)))
    return PAGE.format(divs=divs, plotly=get_plotlyjs(), figures=figures)


def shrink(path: Path) -> None:
    """Fewer colours, half the size."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    image.quantize(COLORS).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
