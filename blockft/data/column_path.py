r"""Paths to values inside a record, such as `passages.passage_text`.

==========================  ==================================================================================
`answer.value`              the field `value` of the object in the field `answer`
`output.answer`             a path goes through lists: the field `answer` of every object in the list `output`
`output[0].answer`          of the first object only
`answers[]`                 a list; a text in its place is read as the JSON or the Python list that it spells
`passage_*`                 the fields `passage_1`, `passage_2` and so on; the star stands for a whole number
`a\.b`                      the field `a.b`; a backslash makes the next character a part of the name
==========================  ==================================================================================

A path below a text reads the text as JSON, as tables and some parquet files hold lists and objects.
"""

import ast
import difflib
import io
import math
import re
import tokenize
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from blockft.data.fields import printable_name
from blockft.data.json_stream import JsonError, decode_json
from blockft.data.sample import RecordError, check_field, is_list
from blockft.inputs import COLUMN_STEP, column_path_problem

MAX_LISTED_PATHS = 200
"""Number of fields of a record that are looked at for a similar name."""

MAX_LISTED_DEPTH = 4
"""Number of objects inside each other that are looked into for fields."""

MISSING: Any = ...
"""The value of a path that a record does not have."""


class Numbered(dict[int, Any]):
    """The values of numbered fields by their numbers, in the order of the numbers."""


@dataclass(frozen=True)
class PathStep:
    """One name of a path. `pattern` is set if the name has a star.

    `selectors` are what stands in brackets after the name: an index, or None for `[]`.
    """

    name: str
    pattern: re.Pattern[str] | None
    selectors: tuple[int | None, ...]


@lru_cache(maxsize=1024)
def parse_path(path: str) -> tuple[PathStep, ...]:
    """Return the steps of a path whose syntax is correct (`column_path_problem`)."""
    assert not column_path_problem(path), path
    steps = []
    for match in COLUMN_STEP.finditer(path):
        written, brackets = match["name"], match["brackets"]
        pieces = re.findall(r"\\.|[^\\]", written, flags=re.DOTALL)
        has_star = "*" in pieces
        expression = "".join(r"([0-9]{1,9})" if piece == "*" else re.escape(piece[-1]) for piece in pieces)
        steps.append(
            PathStep(
                name="".join(piece[-1] for piece in pieces),
                pattern=re.compile(expression) if has_star else None,
                selectors=tuple(int(n) if n else None for n in re.findall(r"\[(\d*)\]", brackets)),
            )
        )
    return tuple(steps)


def find_value(record: Any, path: str) -> Any:
    """Return the value of a path in a record; `MISSING` if the record does not have it.

    A path that goes through a list gives the list of the values in its elements; an element without a value
    gives None. Numbered fields give `Numbered`. NaN is None.

    Raises:
        RecordError: a text where the path goes on, or where it has `[]`, is not JSON.
    """
    return _follow(record, parse_path(path), path)


def _follow(value: Any, steps: Sequence[PathStep], path: str) -> Any:
    if not steps or value is None:
        return _without_nan(value)
    if isinstance(value, str):
        value = _decode_text(value, path)
    if is_list(value):
        found = [_follow(element, steps, path) for element in value]
        if found and all(element is MISSING for element in found):
            return MISSING
        return [None if element is MISSING else element for element in found]
    if not isinstance(value, Mapping):
        return MISSING
    step, rest = steps[0], steps[1:]
    if step.pattern is None:
        if step.name not in value:
            return MISSING
        return _follow(_select(value[step.name], step.selectors, path), rest, path)
    numbers = sorted((int(match[1]), name) for name in value if (match := step.pattern.fullmatch(str(name))))
    found_by_number = Numbered()
    for number, name in numbers:
        check_field(number not in found_by_number, "the record", [*value], f"have one field number {number}")
        inner = _follow(_select(value[name], step.selectors, path), rest, path)
        found_by_number[number] = None if inner is MISSING else inner
    return found_by_number if numbers else MISSING


def _without_nan(value: Any, depth: int = 0) -> Any:
    """Return a value with None for NaN, by which programs of tables mark what is missing."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if not is_list(value) or depth > MAX_LISTED_DEPTH:
        return value
    return [_without_nan(element, depth + 1) for element in value]


def _select(value: Any, selectors: Sequence[int | None], path: str) -> Any:
    """Return the value, or the element of the list that an index in brackets names."""
    for index in selectors:
        if value is None:
            return None
        if isinstance(value, str):
            value = _decode_text(value, path)
        check_field(is_list(value), f"field {path!r}", value, "hold a list where the path has brackets")
        if index is not None:
            value = value[index] if index < len(value) else None
    return value


def _decode_text(text: str, path: str) -> Any:
    if not text.strip():
        return None
    decoded = decode_container(text)
    rule = "hold a list or an object, or the JSON text of one, because the path goes on inside"
    check_field(decoded is not None, f"field {path!r}", text, rule)
    return decoded


def decode_container(text: str) -> Any:
    """Return the list or object that a text spells as JSON, or the list as Python writes it; None otherwise.

    Programs that write a list into a table often write it as Python does: `['one', 'two']`. The list that
    NumPy writes has no commas; Python would join its texts, so it is not read.
    """
    stripped = text.strip()
    if not stripped.startswith(("[", "{")):
        return None
    try:
        decoded = decode_json(stripped)
    except JsonError:
        decoded = _decode_python(stripped)
    return decoded if isinstance(decoded, list | dict) else None


def _decode_python(text: str) -> Any:
    """Return the value that a Python literal spells; None if the text is none. No code runs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes
            value = ast.literal_eval(text)
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    kinds = [kind for kind in kinds if kind != tokenize.NL]
    has_joined_texts = any(a == b == tokenize.STRING for a, b in pairwise(kinds))
    return None if has_joined_texts else value


def flatten(value: Any) -> list[Any]:
    """Return the values of a list, of lists inside it, or of numbered fields; a single value alone."""
    if isinstance(value, Numbered):
        value = list(value.values())
    if is_list(value):
        return [inner for element in value for inner in flatten(element)]
    return [] if value is None or value is MISSING else [value]


def split_lists(record: Any, path: str) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield the record once for every element of the lists that a path goes through.

    ::

        {"context": c, "qas": [{"question": q1}, {"question": q2}]}, "qas.question"
        -> ("qas[0]", ("qas",), {"context": c, "qas": [{"question": q1}]})
           ("qas[1]", ("qas",), {"context": c, "qas": [{"question": q2}]})

    Yields the place of the element, the names of the path up to the last list, and the record with lists of
    one element. A record without a list on the path is yielded once, with an empty place.
    """
    for places, names, part in _split(record, parse_path(path)[:-1], ()):
        yield ".".join(places), names, part


def _split(
    value: Any, steps: Sequence[PathStep], names: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Any]]:
    step = steps[0] if steps else None
    if step is None or step.pattern or not isinstance(value, Mapping) or step.name not in value:
        yield (), (), value
        return
    if any(index is not None for index in step.selectors):
        yield (), (), value
        return
    inner = value[step.name]
    if isinstance(inner, str):
        inner = decode_container(inner) or inner
    elements = inner if is_list(inner) else [inner]
    names = (*names, step.name)
    for i, element in enumerate(elements):
        for places, list_names, part in _split(element, steps[1:], names):
            place = f"{step.name}[{i}]" if is_list(inner) else step.name
            held = [part] if is_list(inner) else part
            is_inside = bool(list_names) or is_list(inner)
            yield (
                (place, *places) if is_inside else (),
                list_names or (names if is_list(inner) else ()),
                {**value, step.name: held},
            )


def path_names(path: str) -> tuple[str, ...]:
    """Return the names of the fields on a path."""
    return tuple(step.name for step in parse_path(path))


def parent_path(path: str) -> str:
    """Return the path of the object that holds the field of a path; "" for a field of the record itself."""
    *_, last = COLUMN_STEP.finditer(path)
    return path[: max(0, last.start() - 1)]


def first_step(path: str) -> str:
    """Return the start of a path, which names a field of the record itself."""
    return next(COLUMN_STEP.finditer(path))[0]


def write_name(name: str) -> str:
    """Return the name of a field as a path writes it."""
    return re.sub(r"[\\.\[\]*]", lambda match: "\\" + match[0], name)


def list_paths(record: Any) -> list[str]:
    """Return the paths of the fields of a record and of the objects in it, a limited number of them."""
    found: dict[str, None] = {}
    _collect_paths(record, "", found, depth=0)
    return list(found)


def _collect_paths(value: Any, prefix: str, found: dict[str, None], depth: int) -> None:
    if depth > MAX_LISTED_DEPTH:
        return
    if is_list(value):
        value = next((element for element in value if isinstance(element, Mapping | list)), None)
        if is_list(value):
            _collect_paths(value, prefix, found, depth + 1)
            return
    if not isinstance(value, Mapping):
        return
    for name, inner in value.items():
        if len(found) >= MAX_LISTED_PATHS:
            return
        path = f"{prefix}{write_name(str(name))}"
        found[path] = None
        _collect_paths(inner, f"{path}.", found, depth + 1)


def similar_paths(path: str, record: Any) -> list[str]:
    """Return up to three paths of the record that are written similarly, the most similar first."""
    paths = list_paths(record)
    folded = {candidate.casefold(): candidate for candidate in reversed(paths)}
    close = [folded[name] for name in difflib.get_close_matches(path.casefold(), folded, n=3, cutoff=0.6)]
    last = path.casefold().rpartition(".")[2]
    close += [candidate for candidate in paths if candidate.casefold().rpartition(".")[2] == last]
    return [*map(printable_name, dict.fromkeys(close))][:3]


def has_path(record: Any, path: str) -> bool:
    """Return whether a record has the field of a path. A field that cannot be read counts."""
    try:
        return find_value(record, path) is not MISSING
    except RecordError:
        return True


def missing_field_error(column: str, path: str, record: Any) -> RecordError:
    """Return the error about a field of a column that is empty, or missing: then with similar names."""
    if has_path(record, path):
        return RecordError(f"field {path!r} of columns.{column} is empty")
    close = " or ".join(similar_paths(path, record))
    return RecordError(
        f"field {path!r} of columns.{column} is missing{f' (did you mean {close}?)' if close else ''}"
    )
