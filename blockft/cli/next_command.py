"""The last lines that a command prints: its result, and the commands that can follow it."""

import os
import shlex
import sys
from collections.abc import Iterable
from itertools import chain, count
from pathlib import Path

from blockft.printable import print_text


def print_next(result: str, *commands: Iterable[object]) -> None:
    """Print a result and the commands that can follow it, each of which can be pasted into a shell.

    The lines go to stderr, because stdout is read by programs. Of several ranks only the first prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    print_text(result.replace("\n", "\\n"), file=sys.stderr)  # a path may hold a new line
    for command in commands:
        print_text(f"next: blockft {shlex.join(map(str, command))}", file=sys.stderr)


def eval_command(model: Path, recipe: Path) -> list[str] | None:
    """Return the command that evaluates an export with its run's recipe; None if the recipe has no `eval`.

    If `eval.output_dir` exists, the command names a new folder beside the model.
    """
    from blockft.config.recipe import load_recipe

    settings = load_recipe(recipe).eval
    if settings is None:
        return None
    command = ["eval", str(model), str(recipe)]
    if Path(settings.output_dir).exists():
        command.append(f"eval.output_dir={unused_path(model.with_name(f'{model.name}-eval'))}")
    return command


def unused_path(path: Path) -> Path:
    """Return `path` if it does not exist; otherwise the first of `path`-2, `path`-3, ... that does not."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(candidate for candidate in chain([path], numbered) if not candidate.exists())
