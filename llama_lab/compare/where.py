"""`--where`: a small language of comparisons. It is parsed here and never handed to Python.

    lora.r in (8, 16) and (quant=nf4 or quant.type=int8) and not status=failed

KEY OP VALUE with = (or ==), !=, <, <=, >, >=; KEY in (VALUE, VALUE), KEY not in (...); and, or, not, parentheses. A
value of several words stands in quotes. A run that lacks the value fits KEY=null and every !=, and nothing else.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama_lab.compare.read import Run
from llama_lab.errors import ConfigError
from llama_lab.results import number

Test = Callable[[Run], bool]
TOKEN = re.compile(
    r"""\s*(?:(?P<op><=|>=|!=|==|=|<|>)|(?P<bracket>[()])|(?P<text>"[^"]*"|'[^']*')|(?P<word>[^\s()<>=!"']+))"""
)
ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
MAX_LENGTH = 2000
MAX_DEPTH = 50
EXAMPLE = 'such as --where "lora.r>=16 and quant=nf4"'


@dataclass(frozen=True, kw_only=True)
class Token:
    """One word of the expression."""

    kind: str
    text: str


def parse_where(text: str, getter: Callable[[str], Callable[[Run], Any]]) -> Test:
    """The test that the expression describes.

    Args:
        getter: gives, for a key, the function that reads it from a run; raises ConfigError for an unknown one.
    Raises:
        ConfigError: says where the expression cannot be read.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"--where has more than {MAX_LENGTH} characters. Type a shorter one.")
    parser = _Parser(_tokens(text), getter)
    test = parser.either(0)
    if parser.rest:
        raise ConfigError(f"--where: nothing fits at '{parser.rest[0].text}'. Comparisons are joined by and, or.")
    return test


def _tokens(text: str) -> list[Token]:
    found, at = [], 0
    while text[at:].strip():
        match = TOKEN.match(text, at)
        if not match:
            raise ConfigError(f"--where: '{text[at:].strip()}' cannot be read. Type comparisons, {EXAMPLE}.")
        kind = str(match.lastgroup)
        found.append(Token(kind=kind, text=match[kind][1:-1] if kind == "text" else match[kind]))
        at = match.end()
    return found


class _Parser:
    """Recursive descent: or, and, not, comparison."""

    def __init__(self, tokens: list[Token], getter: Callable[[str], Callable[[Run], Any]]) -> None:
        self.rest, self.getter = tokens, getter

    def either(self, depth: int) -> Test:
        """One or several that are joined by `or`."""
        tests = [self.both(depth)]
        while self._take_word("or"):
            tests.append(self.both(depth))
        return lambda run: any(test(run) for test in tests)

    def both(self, depth: int) -> Test:
        """One or several that are joined by `and`, which binds more closely."""
        tests = [self.single(depth)]
        while self._take_word("and"):
            tests.append(self.single(depth))
        return lambda run: all(test(run) for test in tests)

    def single(self, depth: int) -> Test:
        """A comparison, `not` one, or something in brackets."""
        if depth > MAX_DEPTH:
            raise ConfigError(f"--where is nested more than {MAX_DEPTH} deep. Type it flatter.")
        if self._take_word("not"):
            inner = self.single(depth + 1)
            return lambda run: not inner(run)
        if self.rest and self.rest[0].text == "(" and self.rest[0].kind == "bracket":
            self.rest = self.rest[1:]
            test = self.either(depth + 1)
            if not self.rest or self.rest[0].text != ")":
                raise ConfigError("--where: a parenthesis is not closed.")
            self.rest = self.rest[1:]
            return test
        return self._comparison()

    def _comparison(self) -> Test:
        is_in = [token.text.lower() for token in self.rest[1:3]]
        if is_in[:1] == ["in"] or is_in == ["not", "in"]:
            return self._membership(wanted=is_in[0] == "in")
        taken, self.rest = self.rest[:3], self.rest[3:]
        kinds = [token.kind for token in taken]
        if kinds not in (["word", "op", "word"], ["word", "op", "text"]):
            said = " ".join(token.text for token in taken) or "the end"
            raise ConfigError(f"--where: '{said}' is no comparison. Type KEY=VALUE, {EXAMPLE}.")
        key, op, value = (token.text for token in taken)
        read = self.getter(key)
        if op in ORDERS:
            bound = as_number(value)
            if bound is None:
                raise ConfigError(f"--where: {key}{op}{value}: {value} is no number. Type {key}={value}, or a number.")
            return lambda run: (found := as_number(read(run))) is not None and ORDERS[op](found, bound)
        return lambda run: is_same(read(run), value) is (op != "!=")

    def _membership(self, *, wanted: bool) -> Test:
        key, self.rest = self.rest[0].text, self.rest[2 if wanted else 3 :]
        end = next((at for at, token in enumerate(self.rest) if token.kind == "bracket" and token.text == ")"), 0)
        opened = self.rest[:1] and self.rest[0].kind == "bracket"
        values = [value for token in self.rest[1:end] for value in _listed(token)]
        if not (opened and values) or any(t.kind not in ("word", "text") for t in self.rest[1:end]):
            raise ConfigError(f"--where: after {key} in stand values in parentheses: {key} in (8, 16).")
        self.rest = self.rest[end + 1 :]
        read = self.getter(key)
        return lambda run: any(is_same(read(run), value) for value in values) is wanted

    def _take_word(self, word: str) -> bool:
        if self.rest and self.rest[0].kind == "word" and self.rest[0].text.lower() == word:
            self.rest = self.rest[1:]
            return True
        return False


def _listed(token: Token) -> list[str]:
    """The values of a word between commas, as in `8,16`; what stands in quotes is one value."""
    return [token.text] if token.kind == "text" else [part for part in token.text.split(",") if part]


def as_number(value: Any) -> float | None:
    """A finite number, or a text that is one; else None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return number(value)


def is_same(found: Any, typed: str) -> bool:
    """Whether a value of a run is what was typed: numbers by value, all else by its text, capitals or not."""
    if isinstance(found, bool) or found is None:
        return typed.lower() == {True: "true", False: "false", None: "null"}[found]
    one, other = as_number(found), as_number(typed)
    if one is not None and other is not None:
        return one == other
    if isinstance(found, list):
        found = "[" + ",".join(map(str, found)) + "]"
    return str(found).casefold() == typed.casefold().replace(", ", ",")
