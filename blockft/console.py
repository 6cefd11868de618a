"""The consoles that print tables and lines: text of users is neither markup nor an emoji code."""

from typing import Any

from rich.console import Console
from rich.text import Text

from blockft.printable import printable


class PlainConsole(Console):
    """A console of rich that prints every text as it is, also in the cells of tables.

    Rich would read `[/b]` as markup and `:smile:` as an emoji.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text of a line, a title or a cell without markup, with control characters escaped."""
        options |= {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(text), **options)
