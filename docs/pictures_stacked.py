"""Draws docs/images/stacked.svg: how a stack works, in a step and over time.

python docs/pictures_stacked.py
"""

from html import escape
from pathlib import Path

IMAGE = Path(__file__).resolve().parent / "images" / "stacked.svg"
WIDTH, HEIGHT = 860, 520
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
"""One a point."""
INK, PALE, FROZEN = "#24292f", "#6e7781", "#d8dee4"
POINTS = ("r=8  lr=2e-4", "r=16  lr=1e-3", "r=64  lr=5e-5")
SLOTS = (
    ((0, 10, 0, "done"), (10, 14, 3, "pruned"), (14, 24, 5, "done")),
    ((0, 4, 1, "pruned"), (4, 14, 4, "done")),
    ((0, 10, 2, "done"),),
)
"""(first, last, point, how it ended) of each slot, in eighths of a run."""


def main() -> None:
    """Write the picture."""
    body = [*step_panel(), *time_panel()]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13">'
    )
    IMAGE.write_text("\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *body, "</svg>\n"]))


def step_panel() -> list[str]:
    """One step: a micro-batch of each row goes through one base; each row has an adapter, a loss and an optimizer."""
    drawn = [text(20, 30, "One step", weight="bold"), text(20, 50, "each row: its own data, seed and settings", PALE)]
    drawn += [box(300, 62, 190, 186, FROZEN), text(395, 86, "one frozen base", anchor="middle", weight="bold")]
    drawn += [text(395, 104, "read once, for all rows", PALE, anchor="middle")]
    for row, settings in enumerate(POINTS):
        y, colour = 118 + 42 * row, COLOURS[row]
        drawn += [box(20, y, 190, 30, colour, opacity=0.2), text(30, y + 20, f"row {row}:  {settings}")]
        drawn += [arrow(212, y + 15, 298), box(318, y, 154, 30, colour), arrow(492, y + 15, 578)]
        drawn += [text(395, y + 20, f"adapter {row}", "white", anchor="middle")]
        drawn += [box(580, y, 260, 30, colour, opacity=0.2)]
        drawn += [text(590, y + 20, "own loss, AdamW, checkpoints, W&B run")]
    return drawn


def time_panel() -> list[str]:
    """Slots over time: who ends makes room for the next point, while the others go on."""
    left, scale, top = 90, 30, 330
    drawn = [text(20, 292, "Over time", weight="bold")]
    drawn += [
        text(20, 312, "a slot whose run ends, or is pruned, takes the next point; the base stays where it is", PALE)
    ]
    for slot, runs in enumerate(SLOTS):
        y = top + 44 * slot
        drawn.append(text(20, y + 21, f"slot {slot}"))
        for first, last, point, how in runs:
            x, width = left + scale * first, scale * (last - first) - 3
            drawn += [box(x, y, width, 32, COLOURS[point], opacity=0.45 if how == "pruned" else 1.0)]
            drawn += [text(x + 8, y + 21, f"point {point}: {how}", INK if how == "pruned" else "white")]
    y = top + 44 * len(SLOTS) + 16
    drawn += [f'<line x1="{left}" y1="{y}" x2="{left + 24 * scale}" y2="{y}" stroke="{PALE}"/>']
    return [*drawn, text(left + 24 * scale, y + 18, "time", PALE, anchor="end")]


def box(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0) -> str:
    """A rectangle."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{colour}" fill-opacity="{opacity}"/>'


def text(x: float, y: float, said: str, colour: str = INK, anchor: str = "start", weight: str = "normal") -> str:
    """A line of text."""
    style = f'fill="{colour}" text-anchor="{anchor}" font-weight="{weight}" xml:space="preserve"'
    return f'<text x="{x}" y="{y}" {style}>{escape(said)}</text>'


def arrow(x: float, y: float, to: float) -> str:
    """From left to right."""
    line = f'<line x1="{x}" y1="{y}" x2="{to - 6}" y2="{y}" stroke="{PALE}" stroke-width="1.5"/>'
    return f'{line}<path d="M {to - 7} {y - 4} L {to} {y} L {to - 7} {y + 4} Z" fill="{PALE}"/>'


if __name__ == "__main__":
    main()
