"""Is the first better than the others, or was it lucky? Welch's t test (two-sided, 5%) between rows with several seeds.

A row with one seed says nothing of its noise, so nothing is said of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_lab.compare.rows import Row

MAX_NAMED = 6


def judge(rows: Sequence[Row], key: str, name: str) -> list[str]:
    """Set the verdict of each ranked row and say it in a few sentences.

    Args:
        rows: ranked by `key`.
        name: what the key is called in a sentence.
    """
    able = [row for row in rows if row.rank is not None]
    if not able:
        what = f"No run has the number {name}" if any(row.is_ok for row in rows) else "No run has ended well"
        return [f"{what}, so there is nothing to rank."]
    if len(able) == 1:
        able[0].verdict = "best"
        return [f"{able[0].name} is the only one that has ended well."]
    tested = [row for row in able if row.numbers[key].n > 1]
    untested = [row for row in able if row.numbers[key].n < 2]
    for row in untested:
        row.verdict = "untested"
    told = _of_tested(tested, key, name, is_all=not untested) if len(tested) > 1 else []
    if untested:
        told.append(_of_untested(able[0], tested, untested))
    return told


def _of_tested(rows: Sequence[Row], key: str, name: str, is_all: bool) -> list[str]:
    """The best of the rows with several seeds against each of the others.

    Args:
        is_all: no row has one seed alone; one that has might be better still, so there is no winner beside it.
    """
    from llama_lab.sweep.welch import SIGNIFICANT, welch_p

    first, *others = rows
    p_values = [welch_p(first.numbers[key].values, row.numbers[key].values) for row in others]
    tied = [row for row, p in zip(others, p_values, strict=True) if not p < SIGNIFICANT]
    first.verdict = "tied" if tied else "winner" if is_all else "leads"
    for row in others:
        row.verdict = "tied" if row in tied else "worse"
    test = "Welch's t test over seeds"
    if tied:
        return [f"{first.name} is tied within noise with {_named(tied)} ({test}, p >= {SIGNIFICANT})."]
    what = f"{name} {_spread(first, key)} against {_spread(others[0], key)} of {others[0].name}"
    who = "The winner is" if is_all else "Of the rows with several seeds the best is"
    return [f"{who} {first.name}: {what} ({test}, largest p = {max(p_values):.2g})."]


def _of_untested(best: Row, tested: Sequence[Row], untested: Sequence[Row]) -> str:
    if len(tested) > 1:
        return f"One seed alone, so not judged: {_named(untested)}."
    return (
        f"Best so far is run {best.name}, but nothing can be said of the noise: that takes two rows with two seeds or "
        "more. Train the best of them again with -m seed=1,2,3"
    )


def _spread(row: Row, key: str) -> str:
    stat = row.numbers[key]
    return f"{stat.mean:.4g} ± {stat.sd:.2g} (n={stat.n})"


def _named(rows: Sequence[Row]) -> str:
    names = [row.name for row in rows[:MAX_NAMED]]
    more = f" and {len(rows) - MAX_NAMED} more" if len(rows) > MAX_NAMED else ""
    return ", ".join(names) + more
