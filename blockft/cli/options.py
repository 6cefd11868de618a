"""The programs that take the command line's words, and arguments that several verbs have."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Turn language models into Block-Attention models, and prove that it worked.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

bench = typer.Typer(help="Measure side by side.")
cache = typer.Typer(help="Keep the keys and values of blocks on a disk.")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships.")
]
CacheName = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a block cache.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the recipe's.")
]
CacheFolderOption = Annotated[
    Path | None, typer.Option("--cache", help="A folder that keeps blocks for later processes.")
]
CacheBytes = Annotated[str | None, typer.Option(help="What that folder may take, as 100GB; no limit.")]
HostBytes = Annotated[str | None, typer.Option(help="Memory for blocks, as 8GB; a quarter of what is free.")]
DeviceBytes = Annotated[
    str | None,
    typer.Option(help="GPU memory for blocks, as 20GB; half of what the model leaves free. CPUs use none."),
]
