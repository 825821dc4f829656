"""The search space: Hydra's sweep syntax as dimensions that Optuna can draw from, and back to words for Hydra.

A dimension can hang on another: `multiples` draws a factor of another setting, `only_if` draws nothing unless another
setting has one of the named values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from llama_lab.errors import ConfigError, did_you_mean
from llama_lab.explain import explain
from llama_lab.sweep.dimension import Dimension, Value, dimension_of, plain

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Space:
    """All dimensions, parents first, and the words that every trial has."""

    dimensions: tuple[Dimension, ...]
    fixed: tuple[str, ...] = ()
    fixed_values: Mapping[str, Value] = field(default_factory=dict)
    """What the fixed words say, by key."""
    typed: frozenset[str] = frozenset()
    """Keys that the command line has taken from the YAML; baselines and conditions of the YAML may not fit them."""

    def draw(self, trial: Trial) -> dict[str, Value]:
        """The point of a trial, by the names of its dimensions; what has been drawn before is kept."""
        point: dict[str, Value] = {}
        for dimension in self.dimensions:
            if self._is_active(dimension, point):
                point[dimension.name] = dimension.draw(trial)
        return point

    def words(self, point: Mapping[str, Value]) -> list[str]:
        """The point as words for Hydra, without the fixed ones."""
        known = self._known(point)
        return [d.word(point[d.name], known) for d in self.dimensions if d.name in point]

    def check_points(self) -> list[list[str]]:
        """Words of few runs in which every choice and both ends of every interval come at least once."""
        missing = {d.key: list(d.ends()) for d in self.dimensions}
        runs = []
        while target := next((d for d in self.dimensions if missing[d.key]), None):
            point, needed = dict[str, Value](), self._needed(target)
            for dimension in self.dimensions:
                if not self._is_active(dimension, point):
                    continue
                wanted = [v for v in missing[dimension.key] if v in needed.get(dimension.key, (v,))]
                other = [v for v in needed.get(dimension.key, ()) if dimension.has(v)]  # words go over conditions
                value = (wanted or other or dimension.ends())[0]
                point[dimension.name] = value
                missing[dimension.key] = [v for v in missing[dimension.key] if v != value]
            if target.name not in point:  # no other setting ever has the values that it hangs on
                missing[target.key] = []
            runs.append([*self.fixed, *self.words(point)])
        return runs

    def describe(self) -> dict[str, str]:
        """The dimensions by name; two spaces are the same if and only if these are."""
        return {d.name: d.describe() for d in self.dimensions}

    def check_baseline(self, point: Mapping[str, Any]) -> dict[str, Value]:
        """A point to be tried first, by the names of its dimensions; what the command line has changed is left out.

        Raises:
            ConfigError: it names a setting that is not searched, or a value that its dimension does not have.
        """
        by_key = {d.key: d for d in self.dimensions}
        checked: dict[str, Value] = {}
        for key, value in point.items():
            if key in by_key and (key not in self.typed or by_key[key].has(value)):
                checked[by_key[key].name] = _checked(by_key[key], value)
            elif key not in self.typed:
                raise ConfigError(
                    f"hydra.sweeper.baselines holds {key}, which the study does not search."
                    f"{did_you_mean(key, by_key)} It searches: {', '.join(by_key)}."
                )
        return checked

    def _is_active(self, dimension: Dimension, point: Mapping[str, Value]) -> bool:
        known = self._known(point)
        return all(key in known and known[key] in values for key, values in dimension.only_if.items())

    def _known(self, point: Mapping[str, Value]) -> dict[str, Value]:
        return dict(self.fixed_values) | {d.key: point[d.name] for d in self.dimensions if d.name in point}

    def _needed(self, dimension: Dimension) -> dict[str, tuple[Value, ...]]:
        """The values of other settings with which a dimension is drawn, those that they hang on included."""
        needed: dict[str, tuple[Value, ...]] = {}
        for other in self.dimensions:
            if other.key in dimension.only_if:
                needed |= self._needed(other) | {other.key: dimension.only_if[other.key]}
        return needed


def parse_space(
    params: Mapping[str, Any],
    arguments: Sequence[str],
    *,
    multiples: Mapping[str, str] | None = None,
    only_if: Mapping[str, Mapping[str, Any]] | None = None,
    config_loader: ConfigLoader | None = None,
) -> Space:
    """The space of a study.

    Args:
        params: setting -> sweep syntax, a list of choices, or one value; from the YAML.
        arguments: words of the command line; they go over `params`.
        multiples: see SweepSettings.multiples.
        only_if: see SweepSettings.only_if.
        config_loader: knows the choices of groups, for model=glob(llama*).
    Raises:
        ConfigError: a word that cannot be read, or one that no space can have.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    try:
        overrides = parser.parse_overrides([*(_as_word(k, v) for k, v in params.items()), *arguments])
    except HydraException as error:
        raise explain(error) from error
    last = {override.get_key_element(): override for override in overrides}
    dimensions = {key: dimension_of(o) for key, o in last.items() if o.is_sweep_override()}
    fixed = {key: o for key, o in last.items() if not o.is_sweep_override()}
    values = {key: plain(o.value()) for key, o in fixed.items()}
    typed = frozenset(override.get_key_element() for override in overrides[len(params) :])
    for key, parent in (multiples or {}).items():
        _add_condition(dimensions, values, key, parent, "multiples", factor_of=parent)
    for key, conditions in (only_if or {}).items():
        if not isinstance(conditions, Mapping):
            raise ConfigError(f"hydra.sweeper.only_if: {key} needs a setting and its values: {{quant: [nf4, fp4]}}.")
        for parent, wanted in conditions.items():
            wanted = tuple(wanted) if isinstance(wanted, list) else (wanted,)
            for value in wanted if parent not in typed else ():
                _check_value(dimensions.get(parent), value, f"hydra.sweeper.only_if: {parent}")
            _add_condition(dimensions, values, key, parent, "only_if", only_if={parent: wanted})
    return Space(
        dimensions=tuple(_parents_first(dimensions)),
        fixed=tuple(str(o.input_line) for o in fixed.values()),
        fixed_values=values,
        typed=typed,
    )


def _as_word(key: str, value: Any) -> str:
    if isinstance(value, dict):
        raise ConfigError(
            f"hydra.sweeper.params.{key} holds settings. A setting has its whole name there, and in quotes what is "
            f'searched: {{{key}.{next(iter(value), "KEY")}: "choice(8,16)"}}. Or type it as a word of its own.'
        )
    if isinstance(value, list) and None in value and len(value) > 1:
        return f"{key}={','.join(_quoted(item) for item in value)}"  # Hydra's choice() takes no null
    if isinstance(value, list):
        return f"{key}=choice({','.join(_quoted(item) for item in value)})"
    return f"{key}={value}" if isinstance(value, str) else f"{key}={_quoted(value)}"


def _quoted(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(_quoted(item) for item in value)}]"
    return str(value)


def _add_condition(
    dimensions: dict[str, Dimension], fixed: Mapping[str, Value], key: str, parent: str, option: str, **change: Any
) -> None:
    if key not in dimensions:
        if key not in fixed:  # fixed by a word of the command line: then nothing is drawn
            raise ConfigError(
                f"hydra.sweeper.{option} names {key}, which the study does not search.{did_you_mean(key, dimensions)}"
            )
        return
    if parent not in dimensions and parent not in fixed:
        raise ConfigError(
            f"hydra.sweeper.{option}: {key} hangs on {parent}, which is neither searched nor typed."
            f"{did_you_mean(parent, [*dimensions, *fixed])} Type {parent}=VALUE as well."
        )
    for name in (key, parent) if "factor_of" in change else ():
        _check_numbers(name, dimensions[name].ends() if name in dimensions else [fixed[name]], f"{key}: {parent}")
    if "only_if" in change:
        change["only_if"] = {**dimensions[key].only_if, **change["only_if"]}
    dimensions[key] = replace(dimensions[key], **change)


def _check_numbers(name: str, values: Iterable[Value], multiple: str) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(
                f"hydra.sweeper.multiples has {{{multiple}}}, and {name}={value} is no number. Type numbers for "
                f"{name}, or take that multiple out."
            )


def _checked(dimension: Dimension, value: Any) -> Value:
    _check_value(dimension, value, f"hydra.sweeper.baselines: {dimension.key}")
    is_float = not dimension.choices and not dimension.is_int
    return float(value) if is_float else value


def _check_value(dimension: Dimension | None, value: Any, where: str) -> None:
    if dimension is not None and not dimension.has(value):
        if dimension.choices:
            raise ConfigError(f"{where}={value} is none of its choices: {', '.join(dimension.words)}.")
        raise ConfigError(f"{where}={value} is outside of {dimension.describe()}.")


def _parents_first(dimensions: Mapping[str, Dimension]) -> Iterable[Dimension]:
    left, placed = dict(dimensions), set[str]()
    while left:
        ready = [key for key, d in left.items() if all(p in placed or p not in dimensions for p in d.parents)]
        if not ready:
            raise ConfigError(
                f"hydra.sweeper: {' and '.join(left)} hang on each other. Take one of the conditions out."
            )
        for key in ready:
            placed.add(key)
            yield left.pop(key)
