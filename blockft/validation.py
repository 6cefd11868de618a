"""Values that pydantic refuses, in words: what was found, what is allowed, and a suggestion."""

from collections.abc import Mapping
from typing import Any

from blockft.errors import list_allowed
from blockft.inputs import shorten

_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "a string",
    "list": "a list",
    "dict": "a mapping",
}
"""What a setting should be, by the first word of pydantic's error type."""

_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
"""What pydantic calls a value that is out of bounds: the bound in words, and where the error holds it."""


def expected_value(kind: str) -> str | None:
    """Return what a value should be, by the type of pydantic's error; None if it is of another kind."""
    return _EXPECTED.get(kind.partition("_")[0])


def describe_value(name: str, fault: Mapping[str, Any]) -> str:
    """Return what is wrong with a value: what was found, what is allowed, and a suggestion.

    name: what the value is for.
    fault: pydantic's record of the error.
    """
    found, kind, context = fault["input"], fault["type"], fault.get("ctx", {})
    value, quoted = shorten(str(found)), shorten(repr(found))
    if kind == "extra_forbidden":
        return f"unknown key {shorten(name)}"
    if kind == "enum":
        names = context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{name} is {quoted} ({list_allowed(found, names)})"
    if kind == "too_short":
        return f"{name} is {value}, it should hold at least {context['min_length']}"
    if kind == "finite_number":
        return f"{name} is {value}, it should be finite"
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        return f"{name} is {value}, it should be {word} {format_bound(context[bound])}"
    if expected := expected_value(kind):
        return f"{name} is {quoted}, it should be {expected}"
    return f"{name} is {quoted}: {fault['msg']}"


def format_bound(bound: float) -> str:
    """Return a bound as it is shown to people."""
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
