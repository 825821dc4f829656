"""The memory that a run will need, card by card."""

from __future__ import annotations

import math

from rich.table import Table
from rich.text import Text

from llama_lab.activations import Device
from llama_lab.cards import CARDS, USABLE_SHARE, Card, fits, largest_micro_batch, nearest_fit
from llama_lab.engine.suits import allowed_memory
from llama_lab.memory import MemoryEstimate, estimate, estimate_fast, is_fast
from llama_lab.plan import Plan
from llama_lab.stacked.gain import WORTH_IT, predicted_gain
from llama_lab.stacked.kind import kind_of
from llama_lab.stacked.rows import best_rows


def memory_tables(made: Plan) -> list[Text | Table]:
    """The predicted peak by its parts, and the cards that it fits on, each below its title."""
    if made.shape is None:
        return []
    rows = made.config.trainer.per_device_train_batch_size
    return [
        Text(f"Predicted peak of memory, {rows} x {_length(made):,} tokens at once", "italic"),
        _parts(made),
        Text(f"Does it fit in {USABLE_SHARE:.0%} of a card?", "italic"),
        _cards(made),
    ]


def _estimate(made: Plan, device: Device, room_gib: float = 0.0) -> MemoryEstimate:
    assert made.shape is not None
    return estimate(
        made.shape, made.config, length=_length(made), device=device, padded=_padded(made), room_gib=room_gib
    )


def _columns(made: Plan) -> dict[str, MemoryEstimate]:
    """The predicted peak on a GPU, at each level of trainer.memory that may be taken, and on a CPU."""
    assert made.shape is not None
    on_gpu = {"GPU": _estimate(made, Device.gpu)}
    if is_fast(made.config, Device.gpu):
        on_gpu = {
            f"GPU, {level}": estimate_fast(made.shape, made.config, level, length=_length(made))
            for level in reversed(allowed_memory(made.config))
        }
    return on_gpu | {"CPU": _estimate(made, Device.cpu)}


def _length(made: Plan) -> int:
    """Tokens of the longest row with its padding; dataset.max_length where the rows are not known."""
    longest = made.longest or made.config.dataset.max_length
    multiple = made.config.dataset.pad_to_multiple_of or 1
    return math.ceil(longest / multiple) * multiple


def _padded(made: Plan) -> bool:
    if made.schedule is None:
        return True
    return made.config.dataset.packing or made.schedule.num_padded_tokens > made.schedule.num_real_tokens


def _parts(made: Plan) -> Table:
    table, columns = Table(), _columns(made)
    table.add_column("GiB")
    for name in columns:
        table.add_column(name, justify="right")
    for part in next(iter(columns.values())).parts():
        table.add_row(part, *(f"{found.parts()[part]:.2f}" for found in columns.values()))
    table.add_section()
    table.add_row("in all", *(f"{found.total:.2f}" for found in columns.values()))
    return table


def _cards(made: Plan) -> Table:
    table = Table()
    auto, stacks = made.config.trainer.micro_batch_size == "auto", kind_of(made.config).alone is None
    columns = ("card", "GiB", "", "rows at once" if auto else "the nearest that fits", *(["stacked"] if stacks else []))
    for column in columns:
        table.add_column(column, overflow="fold")
    for card in CARDS:
        found = _estimate(made, card.device, room_gib=card.usable_gib)
        sign = Text("yes", "green") if fits(found, card) else Text("no", "red")
        advice = _rows(made, card) if auto else _advice(made, card)
        table.add_row(card.name, f"{found.total:.1f}", sign, advice, *([_stacked(made, card)] if stacks else []))
    return table


def _stacked(made: Plan, card: Card) -> str:
    """Points of a sweep that hydra/launcher=stacked trains at a time, and how much faster that is predicted to be."""
    if not card.bf16 or made.schedule is None:
        return "-"
    assert made.shape is not None
    num_tokens = made.schedule.num_real_tokens / made.schedule.num_batches
    r, length = made.config.lora.r, _length(made)
    rows = best_rows(made.shape, made.config, r, num_tokens=num_tokens, length=length, room_gib=card.usable_gib)
    gain = predicted_gain(num_tokens, rows)
    return f"{rows} ({gain:.2f}x)" if gain >= WORTH_IT else "-"


def _advice(made: Plan, card: Card) -> str:
    assert made.shape is not None
    words = nearest_fit(made.shape, made.config, card, length=_length(made), padded=_padded(made))
    return "nothing" if words is None else " ".join(words)


def _rows(made: Plan, card: Card) -> str:
    assert made.shape is not None
    rows = largest_micro_batch(
        made.shape,
        made.config,
        memory_gib=card.memory_gib,
        length=_length(made),
        device=card.device,
        padded=_padded(made),
    )
    return "none" if rows is None else str(rows)
