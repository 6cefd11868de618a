"""`blockft recipes`: list the shipped recipes."""

from pathlib import Path

from rich.table import Table

from blockft.config.recipe import list_recipes
from blockft.console import PlainConsole

SCHEMA_LINE = "# yaml-language-server: $schema="
"""How the first line of a recipe begins, which names the JSON Schema for editors."""


def recipes() -> None:
    """Print a table of the shipped recipes and their purposes."""
    table = Table("recipe", "purpose", box=None)
    for name, path in list_recipes().items():
        table.add_row(name, purpose(path))
    PlainConsole().print(table)


def purpose(path: Path) -> str:
    """Return the first comment of a recipe that does not name the schema; "" if the recipe has none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next((line for line in lines if not line.startswith(SCHEMA_LINE)), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""
