"""Which point goes where: into the stack that runs, into the next one, or into a process of its own.

A GPU, or the CPU, has one stack or one lone run at a time. Each thread of the sweep brings one point and waits for its
end.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama_lab.config import RunConfig
from llama_lab.stacked.host import ALONE, APART, StackSettings
from llama_lab.stacked.kind import Kind, kind_of
from llama_lab.stacked.places import Left, LonePlace, StackPlace, may_drop
from llama_lab.stacked.rows import Stacking, stacking
from llama_lab.sweep import child
from llama_lab.sweep.processes import STOP, Hear, run_alone, warm_up
from llama_lab.sweep.slots import visible_gpus

POLL_S = 0.5
SETTLE_S = 1.0
"""So long after the last point has come a study begins: points that begin together are judged together, and of several
kinds the one with the most points is to be first, so that later ones are compared with many."""


@dataclass(kw_only=True, eq=False)
class Stacks:
    """The stacks of a sweep. Thread-safe."""

    wanted: int | None
    """hydra.launcher.rows; None for auto."""
    configs: Sequence[RunConfig]
    """Points of the sweep, from which the stacks' ranks are read."""
    folder: Path
    """For the stacks' logs."""
    offline: bool
    """No point needs the hub."""
    is_queue: bool
    """All points are known and wait; else each thread finds its next one when it has ended the last."""
    most_points: int | None = None
    """Of a study: so many trials at a time, at most."""
    note: Callable[[str], None] = print
    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    """Points by device and kind."""
    active: dict[str, StackPlace | LonePlace] = field(default_factory=dict)
    """By device."""
    left: dict[str, Left] = field(default_factory=dict)
    """Processes of stacks whose rows have ended, by device: imports and kernels are there already."""
    ways: dict[Kind, Stacking] = field(default_factory=dict)
    deciding: threading.Lock = field(default_factory=threading.Lock)
    num_stacks: int = 0
    came_at: float = 0.0
    """When the last point came."""
    said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.offline:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries are imported

    def run(self, order: child.Order, hear: Hear) -> int:
        """Do one run; its exit code. Where the sweep is interrupted, that of a process that was ended."""
        kind = kind_of(order.config)
        is_apart = False
        while not STOP.is_set():
            num_rows = None if is_apart else self.num_rows(kind, order.config, _device(order))
            place = self._enter(order, kind, num_rows)
            if place is None:
                break
            try:
                if isinstance(place, LonePlace):
                    return run_alone(order, hear, child.work)
                last_word = place.do(order, hear)
            finally:
                self._leave(place)
            if last_word is None:
                if place.is_to_begin_again():
                    continue
                if place.settings.num_rows == 1:
                    return place.exit_code()
                self._broken(place)
            elif last_word[0] == ALONE:
                self._set_alone(kind, str(last_word[1]))
            elif last_word[0] == APART:
                self.note(f"{order.folder.name} is trained by itself: {last_word[1]}")
                is_apart = True
            else:
                return int(last_word[1])
        return 128 + signal.SIGTERM

    def decide(self) -> int:
        """Say how the known points are trained; the most rows of a stack."""
        warm_up()  # on a GPU the rows are tokenised now, for which the same libraries are imported here
        return max((self.num_rows(kind_of(config), config) or 1 for config in self.configs), default=1)

    @property
    def num_kinds(self) -> int:
        """Of the known points, those that go into stacks."""
        kinds = {kind_of(config) for config in self.configs}
        return sum(kind in self.ways and self.ways[kind].num_rows is not None for kind in kinds)

    def num_rows(self, kind: Kind, config: RunConfig, device: str = "") -> int | None:
        """Rows of a stack of this kind, None where each has a process of its own; decided, and said, once a kind."""
        with self.deciding:
            if kind not in self.ways:
                self.ways[kind] = self._decided(kind, config, device)
            return self.ways[kind].num_rows

    def close(self) -> None:
        """End the stacks, which have no rows any more."""
        with self.changed:
            for place in [*self.active.values(), *self.left.values()]:
                place.close()
            self.active.clear()
            self.left.clear()

    def _decided(self, kind: Kind, config: RunConfig, device: str) -> Stacking:
        if kind.alone is not None:
            self._say(f"Points with {kind.alone} are trained one by one: a stack does not take that.")
            return Stacking(num_rows=None, said="")
        gpus = device.split(",") if device else visible_gpus()
        num_points = sum(kind_of(c) == kind for c in self.configs) if self.is_queue else self.most_points
        gpu, rank = gpus[0] if gpus else None, self._rank(kind, config)
        found = stacking(self.wanted, config, rank, gpu, num_points=num_points)
        self.note(f"Points on {kind.base}: {found.said}.")
        return found

    def _like(self, kind: Kind, config: RunConfig) -> list[RunConfig]:
        """The points that a stack of this kind is made for, so far as they are known.

        Of a study each choice is known, but not what it is combined with.
        """
        return [c for c in [*self.configs, config] if not self.is_queue or kind_of(c) == kind]

    def _rank(self, kind: Kind, config: RunConfig) -> int:
        return max(c.lora.r for c in self._like(kind, config))

    def _enter(self, order: child.Order, kind: Kind, num_rows: int | None) -> StackPlace | LonePlace | None:
        """Wait for a place; None where the sweep is interrupted."""
        device = _device(order)
        with self.changed:
            self.waiting[device, kind] += 1
            self.came_at = time.monotonic()
            try:
                while not self._has_place(device, kind, order.config, num_rows, order.env):
                    self.changed.wait(POLL_S)
                    if STOP.is_set():
                        return None
            finally:
                self.waiting[device, kind] -= 1
            if device not in self.active:
                self.active[device] = self._new(order, kind, num_rows)
            place = self.active[device]
            place.num_points += 1
            return place

    def _has_place(
        self, device: str, kind: Kind, config: RunConfig, num_rows: int | None, env: Mapping[str, str] | None = None
    ) -> bool:
        place = self.active.get(device)
        others = [other for (where, other), number in self.waiting.items() if where == device and number]
        others = [other for other in others if other != kind]
        if place is not None and place.takes(kind, config, num_rows, env or {}):
            # a study hands out points of all kinds: a stack must not get ever emptier while others wait
            own = self._together(device, kind, beside=place.num_points)
            fullest = max((self._together(device, other) for other in others), default=0)
            return self.is_queue or 2 * own >= fullest
        if place is not None and place.num_points == 0:
            if left := place.leave():
                self.left[device] = left
            del self.active[device]
            place = None
        if place is not None or self._more_are_coming():
            return False
        return self.waiting[device, kind] >= max((self.waiting[device, other] for other in others), default=0)

    def _more_are_coming(self) -> bool:
        """At the beginning of a study the points come one behind the other."""
        is_early = self.num_stacks == 0 and time.monotonic() - self.came_at < SETTLE_S
        return is_early and not self.is_queue

    def _together(self, device: str, kind: Kind, beside: int = 0) -> int:
        """How many points a stack of this kind has, once those that wait have joined the ones it has already."""
        way = self.ways.get(kind)
        return min(way.num_rows if way and way.num_rows else 1, beside + self.waiting[device, kind])

    def _new(self, order: child.Order, kind: Kind, num_rows: int | None) -> StackPlace | LonePlace:
        left = self.left.pop(_device(order), None)
        # of one row alone an end for want of memory is final, so it gets an empty process
        if left and (num_rows in (None, 1) or left.env != order.env or not left.is_alive()):
            left.close()
            left = None
        if num_rows is None:
            return LonePlace()
        self.num_stacks += 1
        settings = StackSettings(
            num_rows=num_rows,
            rank=self._rank(kind, order.config),
            dropout=any(may_drop(c) for c in self._like(kind, order.config)),
            log=self.folder / f"stack-{self.num_stacks}.log",
            env=dict(order.env),
            num_first=min(num_rows, 1 + self.waiting[_device(order), kind]),
        )
        return StackPlace(kind=kind, settings=settings, left=left)

    def _leave(self, place: StackPlace | LonePlace) -> None:
        with self.changed:
            place.num_points -= 1
            self.changed.notify_all()

    def _broken(self, stack: StackPlace) -> None:
        """The process of a stack has ended before its rows: half as many get the next one."""
        with self.deciding:
            if STOP.is_set() or stack.was_told:
                return
            stack.was_told = True
            rows = stack.settings.num_rows // 2
            told = f"{rows} at a time" if rows > 1 else "one by one"
            self.ways[stack.kind] = Stacking(num_rows=rows, said=told)
            self.note(f"The stack {stack.how_it_ended()}. Its points go on from their checkpoints, {told}.")

    def _set_alone(self, kind: Kind, reason: str) -> None:
        with self.deciding:
            self.ways[kind] = Stacking(num_rows=None, said=reason)
            self._say(f"Points with {reason} are trained one by one: a stack does not take that.")

    def _say(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.note(text)


def _device(order: child.Order) -> str:
    return order.env.get("CUDA_VISIBLE_DEVICES", "")
