"""Write text of users into Markdown so that it is shown as it is."""

import re
from collections.abc import Sequence
from typing import Any

from blockft.printable import printable


def escape_markdown(text: object) -> str:
    """Return the text as one line of Markdown that shows it, in a paragraph, a heading or a cell."""
    # a backslash escapes punctuation only, and a bracket starts a link only before another one
    special = r"[`*<>|]|\\(?=[!-/:-@\[-`{-~])|\](?=[(\[:])"
    return re.sub(special, r"\\\g<0>", " ".join(printable(text).split()))


def code_span(text: object) -> str:
    """Return the text as code within a line. Its fence is longer than all backticks in the text."""
    line = " ".join(printable(text).split())
    fence = "`" * (1 + _longest_fence(line))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(text: str, language: str) -> str:
    """Return the text as a block of code. Its fence is longer than all backticks in the text."""
    fence = "`" * max(3, 1 + _longest_fence(text))
    return f"{fence}{language}\n{printable(text).rstrip()}\n{fence}"


def markdown_table(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table whose header and cells show their texts."""
    lines = [columns, *rows]
    header, *body = ["| " + " | ".join(map(escape_markdown, line)) + " |" for line in lines]
    return "\n".join([header, "| " + " | ".join(["---"] * len(columns)) + " |", *body])


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
