"""`blockft recipes`: the recipes that ship."""

from rich.console import Console
from rich.table import Table

from blockft.config.recipe import RECIPES_FOLDER


def recipes() -> None:
    """Print a table of the shipped recipes, each with the comment that it opens with."""
    table = Table("recipe", "what it does", box=None)
    for path in sorted(RECIPES_FOLDER.glob("*.yaml")):
        opening = path.read_text(encoding="utf-8").partition("\n")[0]
        table.add_row(path.stem, opening.removeprefix("#").strip() if opening.startswith("#") else "")
    Console().print(table)
