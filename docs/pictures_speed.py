"""Draws docs/images/speed_sweep.svg: speed and memory over tokens a step, rank and quant type, beside the floor.

python docs/pictures_speed.py     # docs/render.py draws it too, and with --check compares
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pictures_stacked import COLOURS, INK, PALE, box, text
from render_sweep import SWEEP, Swept, by_quant, by_rank, by_tokens, swept

IMAGE = Path(__file__).resolve().parent / "images" / "speed_sweep.svg"
WIDTH, HEIGHT = 860, 800
BLUE, ORANGE = COLOURS[:2]
PLOT = (330, 150)
"""Width and height of a panel between its axes."""
LEFT, TOP, STEP = (70, 500), 90, 240
"""Where the columns begin; where the first row does, and from row to row."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a panel, or its bars."""

    name: str
    colour: str
    values: list[float]
    dashed: bool = False
    bars: bool = False


def speed_sweep_svg(file: Path = SWEEP) -> str | None:
    """The picture; None where nothing was measured."""
    cases = swept(file)
    if not cases:
        return None
    card = " and ".join(sorted({case.row["card"] for case in cases}))
    body = [text(20, 28, f"A Llama-2-7B-shaped model on one {card}", weight="bold")]
    for row, (kind, axis, is_bars) in enumerate(
        ((by_tokens, "tokens a step", False), (by_rank, "rank", False), (by_quant, "quant type", True))
    ):
        if found := kind(cases):
            body += panels(TOP + STEP * row, axis, found, is_bars)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *body, "</svg>\n"])


def panels(y: int, axis: str, cases: list[Swept], is_bars: bool) -> list[str]:
    """Speed on the left, memory on the right."""
    ticks = {"tokens a step": _tokens, "rank": lambda case: f"{case.r}"}.get(axis, lambda case: case.quant)
    names = [ticks(case) for case in cases]
    places = _places([_number(axis, case) for case in cases], is_bars)
    speed = [Series(name="measured", colour=BLUE, values=[c.row["tokens_per_s"] for c in cases], bars=is_bars)]
    if all(case.floor_ms for case in cases):
        floor = [1000 * case.row["tokens_per_step"] / case.floor_ms for case in cases if case.floor_ms]
        speed.append(Series(name="at the floor", colour=INK, values=floor, dashed=True, bars=is_bars))
    memory = [
        Series(name="measured", colour=ORANGE, values=[c.row["peak_memory_gib"] for c in cases], bars=is_bars),
        Series(name="predicted", colour=INK, values=[c.row["predicted_gib"] for c in cases], dashed=True, bars=is_bars),
    ]
    levels = [f"{case.row['memory']}" for case in cases]
    drawn = panel(LEFT[0], y, f"tokens/s over {axis}", places, names, speed)
    return drawn + panel(LEFT[1], y, f"peak memory in GiB over {axis}", places, names, memory, levels)


def panel(
    x: int,
    y: int,
    title: str,
    places: list[float],
    names: list[str],
    series: list[Series],
    levels: list[str] | None = None,
) -> list[str]:
    """Axes, lines or bars, and what they are.

    Args:
        places: of the values, from 0 to 1 along the panel.
        levels: trainer.memory of each; written where it changes.
    """
    width, height = PLOT
    ends = _rounded(max(value for line in series for value in line.values))
    xs = [x + width * place for place in places]
    drawn = [text(x, y - 30, title, weight="bold")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = y + height * (1 - share)
        drawn += [f'<line x1="{x}" y1="{at}" x2="{x + width}" y2="{at}" stroke="{PALE}" stroke-opacity="0.3"/>']
        drawn += [text(x - 8, at + 4, f"{ends * share:,.4g}" if ends < 1000 else f"{ends * share:,.0f}", PALE, "end")]
    drawn += [text(at, y + height + 18, name, PALE, "middle") for at, name in zip(xs, names, strict=True)]
    for line in series:
        ys = [y + height * (1 - value / ends) for value in line.values]
        drawn += _bars(xs, ys, y + height, line) if line.bars else _line(xs, ys, line)
    for i, line in enumerate(series):
        drawn.append(text(x + 110 * i, y - 12, f"{'- - -' if line.dashed else '—'} {line.name}", line.colour))
    if levels:
        changed = [i for i, level in enumerate(levels) if i == 0 or level != levels[i - 1]]
        drawn += [text(xs[i] - 14, y + height + 34, f"memory={levels[i]}", PALE) for i in changed]
    return drawn


def _line(xs: list[float], ys: list[float], line: Series) -> list[str]:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    drawn = [f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>']
    if line.dashed:
        return drawn
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{line.colour}"/>' for x, y in zip(xs, ys, strict=True)]
    return drawn + dots


def _bars(xs: list[float], ys: list[float], bottom: float, line: Series) -> list[str]:
    tops = zip(xs, ys, strict=True)
    if not line.dashed:
        return [box(round(x - 28, 1), round(y, 1), 56, round(bottom - y, 1), line.colour) for x, y in tops]
    style = f'stroke="{line.colour}" stroke-width="2" stroke-dasharray="5 4"'
    return [f'<line x1="{x - 36:.1f}" y1="{y:.1f}" x2="{x + 36:.1f}" y2="{y:.1f}" {style}/>' for x, y in tops]


def _places(numbers: list[float], is_bars: bool) -> list[float]:
    """Along the axis: logarithmic, or one after the other."""
    if is_bars:
        return [(i + 0.5) / len(numbers) for i in range(len(numbers))]
    logs = [math.log2(number) for number in numbers]
    return [(log - logs[0]) / ((logs[-1] - logs[0]) or 1) for log in logs]


def _number(axis: str, case: Swept) -> float:
    return case.nominal_tokens if axis == "tokens a step" else case.r


def _tokens(case: Swept) -> str:
    return f"{case.nominal_tokens:,}"


def _rounded(value: float) -> float:
    """The next number of which a quarter is a round one."""
    step = 10 ** math.floor(math.log10(value))
    return next(step * share for share in (1, 2, 3, 4, 6, 8, 10) if step * share >= value)


def main() -> None:
    """Write the picture."""
    picture = speed_sweep_svg()
    if picture is None:
        sys.exit(f"{SWEEP} does not exist. Type on a GPU: python -m benchmarks.speed BASE --sweep")
    IMAGE.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
