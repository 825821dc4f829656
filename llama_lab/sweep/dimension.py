"""One dimension of a search space: Hydra's word for several values, what Optuna draws of it, and a word again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString, RangeSweep

from llama_lab.errors import ConfigError, did_you_mean
from llama_lab.known_keys import field_type
from llama_lab.words import check_values

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One setting or group that the study chooses."""

    key: str
    """As it is typed to Hydra: lora.r, quant, +dataset.columns.text."""
    choices: tuple[Value, ...] = ()
    words: tuple[str, ...] = ()
    """The choices as Hydra reads them."""
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    is_int: bool = False
    factor_of: str | None = None
    """The setting that what is drawn is multiplied with."""
    only_if: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    """Other settings and the values of them with which this one is drawn."""

    @property
    def name(self) -> str:
        """What the study calls it: its key, or lora.alpha/lora.r for a factor."""
        return f"{self.key}/{self.factor_of}" if self.factor_of else self.key

    @property
    def parents(self) -> tuple[str, ...]:
        """The settings that must be known before this one is drawn."""
        return (*self.only_if, *((self.factor_of,) if self.factor_of else ()))

    def draw(self, trial: Trial) -> Value:
        """The value that the study's sampler chooses, or has chosen before for this trial."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.is_int:
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def ends(self) -> list[Value]:
        """Values that show whether all of them are right: every choice, or both ends."""
        if self.choices:
            return list(self.choices)
        ends = [self.low, self.high] if self.low != self.high else [self.low]
        return [int(end) for end in ends] if self.is_int else list(ends)

    def has(self, value: Any) -> bool:
        """Whether the value can be drawn."""
        if self.choices:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        is_on_step = math.isclose(steps, round(steps), abs_tol=1e-9)
        return is_on_step and (not self.is_int or float(value).is_integer())

    def describe(self) -> str:
        """One line that changes when the dimension does."""
        what = f"choice({','.join(self.words)})" if self.choices else f"interval({self.low:g},{self.high:g})"
        tags = [tag for tag, on in (("int", self.is_int), ("log", self.log)) if on]
        step = f" step {self.step:g}" if self.step else ""
        condition = f" if {json.dumps({k: list(v) for k, v in self.only_if.items()})}" if self.only_if else ""
        return " ".join([*tags, what]) + step + condition

    def word(self, value: Value, known: Mapping[str, Value]) -> str:
        """KEY=VALUE for Hydra.

        Args:
            known: the values of all settings by key, from which that of `factor_of` is taken.
        """
        if self.factor_of:
            return f"{self.key}={_number(float(str(value)) * float(str(known[self.factor_of])))}"
        if self.choices:
            return f"{self.key}={self.words[self.choices.index(value)]}"
        return f"{self.key}={value!r}"


def dimension_of(override: Override) -> Dimension:
    """A word of Hydra's that stands for several values, as a dimension.

    Raises:
        ConfigError: no dimension can be like that.
    """
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return _interval(override, key, value)
    if getattr(value, "tags", None):
        raise ConfigError(
            f"{override.input_line}: only an interval has a tag. Type {key}=tag(log,interval(LOW,HIGH)), or leave the "
            "tag out."
        )
    check_values(override)
    if isinstance(value, RangeSweep) and not value.shuffle:
        numbers: list[Any] = list(override.sweep_iterator())
        if len(numbers) > 1:
            is_int = all(isinstance(number, int) for number in numbers)
            low, high = sorted((numbers[0], numbers[-1]))
            return Dimension(key=key, low=low, high=high, step=abs(value.step), is_int=is_int)
    choices = [plain(item) for item in override.sweep_iterator()]
    if any(isinstance(choice, float) and math.isnan(choice) for choice in choices):
        raise ConfigError(f"{override.input_line}: nan is no value. Leave it out.")
    words = [w.lower() if w in ("True", "False") else w for w in map(str, override.sweep_string_iterator())]
    return Dimension(key=key, choices=tuple(choices), words=tuple(words))


def _interval(override: Override, key: str, value: IntervalSweep) -> Dimension:
    word = override.input_line
    low, high = float(value.start or 0), float(value.end or 0)
    for tag in value.tags - {"log"}:
        raise ConfigError(f"{word}: the tag {tag} is not known.{did_you_mean(tag, ['log'])} There is one: log.")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"{word}: the ends of an interval are finite numbers, such as interval(0,0.1).")
    if low > high:
        raise ConfigError(f"{word}: the interval ends before it begins. Type interval({high:g},{low:g}).")
    if "log" in value.tags and low <= 0:
        raise ConfigError(f"{word}: a log scale begins above 0. Type tag(log,interval(1e-5,{high:g})).")
    # Hydra reads the ends as floats; the setting knows whether it is a whole number
    is_int = isinstance(value.start, int) or (field_type(key) is int and low.is_integer() and high.is_integer())
    return Dimension(key=key, low=low, high=high, log="log" in value.tags, is_int=is_int)


def plain(value: Any) -> Value:
    """What Optuna can store: numbers, words, true, false and null as they are, all else as it is typed."""
    if isinstance(value, QuotedString):
        return value.text
    return value if isinstance(value, bool | int | float | str | None) else json.dumps(value)


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
