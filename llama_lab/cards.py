"""Which cards a run fits on, and the nearest change that makes it fit. Nothing here touches a GPU or imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import combinations, product

from llama_lab.activations import Device
from llama_lab.checks import check_combination
from llama_lab.choices import QuantType
from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError
from llama_lab.memory import MemoryEstimate, estimate, rows_at_once
from llama_lab.params import ModelShape
from llama_lab.trainer_config import divisors

USABLE_SHARE = 0.9
"""Of a card's memory: the rest is for CUDA's context and for what PyTorch's allocator cannot join. On an H100 PyTorch
reserved 2 to 14% more than the peak that is predicted here (benchmarks/results/memory.json), of which it gives back
what it can before it fails."""
SHORTEST = 256
"""Tokens below which rows are not cut to make a run fit."""
LENGTH_STEP = 64


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU by the name that people use."""

    name: str
    memory_gib: float
    """As the driver reports it, GiB."""
    bf16: bool = True

    @property
    def usable_gib(self) -> float:
        """What a run can have of it."""
        return USABLE_SHARE * self.memory_gib

    @property
    def device(self) -> Device:
        """How quant.compute_dtype=auto computes on it."""
        return Device.gpu if self.bf16 else Device.gpu_without_bf16


CARDS = (
    Card(name="T4 16 GB", memory_gib=15.0, bf16=False),
    Card(name="RTX 3090 24 GB", memory_gib=24.0),
    Card(name="RTX 4090 24 GB", memory_gib=24.0),
    Card(name="A100 40 GB", memory_gib=40.0),
    Card(name="A100 80 GB", memory_gib=80.0),
    Card(name="H100 80 GB", memory_gib=79.6),
)


def fits(found: MemoryEstimate, card: Card) -> bool:
    """Whether a run of this peak goes through on a card that nothing else uses."""
    return found.total <= card.usable_gib


def largest_micro_batch(
    shape: ModelShape,
    config: RunConfig,
    *,
    memory_gib: float,
    length: int,
    device: Device = Device.gpu,
    padded: bool = False,
) -> int | None:
    """The most rows at once that fit in USABLE_SHARE of `memory_gib` and divide the rows of an optimizer step.

    None where not even one row fits.
    """
    room = USABLE_SHARE * memory_gib
    for rows in divisors(config.trainer.effective_batch_size):
        tried = replace(config, trainer=config.trainer.with_micro_batch(rows))
        if estimate(shape, tried, length=length, device=device, padded=padded, room_gib=room).total <= room:
            return rows
    return None


def nearest_fit(
    shape: ModelShape, config: RunConfig, card: Card, *, length: int, padded: bool = False
) -> list[str] | None:
    """The words to add so that a run fits on `card`; [] where it does already, None where nothing helps.

    As few changes as possible, the harmless before the harmful: fewer rows at once with the same rows a step,
    checkpointing, double quantisation, 4-bit weights, shorter rows.
    """
    start = _Plan(config=config, length=length)

    def works(plan: _Plan) -> bool:
        found = estimate(
            shape, plan.config, length=plan.length, device=card.device, padded=padded, room_gib=card.usable_gib
        )
        return fits(found, card)

    if works(start):
        return []
    changes = [list(change(start)) for change in (_fewer_rows, _checkpointing, _double_quant, _four_bit, _shorter)]
    for number in range(1, len(changes) + 1):
        for chosen in combinations(filter(None, changes), number):
            strongest = tuple(edits[-1] for edits in reversed(chosen))
            if works(_applied(start, strongest)):
                plans = (_applied(start, edits) for edits in product(*reversed(chosen)))
                return list(next(filter(works, plans)).words)
    return None


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A changed run, and the words that change it."""

    config: RunConfig
    length: int
    words: tuple[str, ...] = ()


_Edit = Callable[[_Plan], _Plan]


def _applied(start: _Plan, edits: tuple[_Edit, ...]) -> _Plan:
    # the last change came first out of the product, so that it varies slowest: rows are cut as little as possible
    return reduce(lambda plan, edit: edit(plan), reversed(edits), start)


def _fewer_rows(start: _Plan) -> Iterator[_Edit]:
    """Each smaller micro-batch at the same rows a step, the largest first."""
    t = start.config.trainer
    for rows in divisors(t.effective_batch_size):
        words: tuple[str, ...] = (
            f"trainer.per_device_train_batch_size={rows}",
            f"trainer.gradient_accumulation_steps={t.effective_batch_size // rows}",
        )
        if t.micro_batch_size is not None:
            words = (f"trainer.micro_batch_size={rows}",)
        if rows < rows_at_once(t):
            yield partial(_set_rows, rows, words)


def _set_rows(rows: int, words: tuple[str, ...], plan: _Plan) -> _Plan:
    config = replace(plan.config, trainer=plan.config.trainer.with_micro_batch(rows))
    return replace(plan, config=config, words=(*plan.words, *words))


def _checkpointing(start: _Plan) -> Iterator[_Edit]:
    def switch_on(plan: _Plan) -> _Plan:
        trainer = replace(plan.config.trainer, gradient_checkpointing=True)
        words = (*plan.words, "trainer.gradient_checkpointing=true")
        return replace(plan, config=replace(plan.config, trainer=trainer), words=words)

    if not start.config.trainer.gradient_checkpointing:
        yield switch_on


def _double_quant(start: _Plan) -> Iterator[_Edit]:
    if start.config.quant.is_4bit and not start.config.quant.double_quant:
        yield partial(_set_quant, start.config.quant.type, "quant.double_quant=true")


def _four_bit(start: _Plan) -> Iterator[_Edit]:
    edit = partial(_set_quant, QuantType.nf4, "quant=nf4")
    try:
        check_combination(edit(start).config)
    except ConfigError:  # such as lora.init=pissa, which needs the weights as they are
        return
    if not start.config.quant.is_4bit:
        yield edit


def _set_quant(kind: QuantType, word: str, plan: _Plan) -> _Plan:
    quant = replace(plan.config.quant, type=kind, double_quant=True)
    return replace(plan, config=replace(plan.config, quant=quant), words=(*plan.words, word))


def _shorter(start: _Plan) -> Iterator[_Edit]:
    """Each shorter row, the longest first."""
    longest = (start.length - 1) // LENGTH_STEP * LENGTH_STEP
    for length in range(longest, SHORTEST - 1, -LENGTH_STEP):
        yield partial(_set_length, length)


def _set_length(length: int, plan: _Plan) -> _Plan:
    return replace(plan, length=length, words=(*plan.words, f"dataset.max_length={length}"))
