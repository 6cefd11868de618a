"""`blockft cache`: commands for the folder of a block cache."""

from pathlib import Path
from typing import Annotated

import typer

from blockft.cli.next_command import print_next
from blockft.cli.options import AsJson, CacheBytes, CacheName, ModelName, path_argument, path_option

app = typer.Typer(help="Manage a folder of cached blocks.", rich_markup_mode=None)


@app.command("build")
def cache_build(
    model: ModelName,
    corpus: Annotated[
        Path,
        path_argument(
            metavar="CORPUS",
            help='JSON lines {"title": ..., "text": ...} or strings; - reads standard input.',
        ),
    ],
    folder: Annotated[
        Path, path_option("--cache", metavar="FOLDER", help="Folder of the cache; created if missing.")
    ],
    cache_bytes: CacheBytes = None,
) -> None:
    """Encode the documents of a corpus into a cache.

    The same command resumes an interrupted build.

    \b
    Example:
      blockft cache build out/model documents.jsonl --cache out/cache
    """
    from blockft.stages.cache import build_cache
    from blockft.stages.generate import CacheArguments

    build_cache(model, corpus, CacheArguments(folder=folder, disk=cache_bytes, host="0", device="0"))
    generate = ["generate", model, "--input", "requests.jsonl", "--cache", folder]
    print_next(f"cache: {folder}", generate)


@app.command("stats")
def cache_stats(folder: CacheName, as_json: AsJson = False) -> None:
    """Show the models, sizes and last uses of a cache.

    \b
    Example:
      blockft cache stats out/cache --json
    """
    from blockft.stages.cache import print_cache_stats

    print_cache_stats(folder, as_json=as_json)


@app.command("verify")
def cache_verify(
    folder: CacheName,
    remove: Annotated[bool, typer.Option("--remove", help="Remove damaged entries.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every entry of a cache and check its digest.

    \b
    Example:
      blockft cache verify out/cache --remove
    """
    from blockft.stages.cache import verify_cache

    verify_cache(folder, remove=remove, as_json=as_json)


@app.command("prune")
def cache_prune(
    folder: CacheName,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Remove the least recently used entries above this size, for example 10GB or 512MiB.",
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="Remove entries not used for this time, for example 7d or 12h. Uses are recorded every "
            "ten minutes.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only entries of this model: its name, or the start of its fingerprint. Without another "
            "option, all of them.",
        ),
    ] = None,
) -> None:
    """Remove entries of a cache, and files left by killed processes.

    At least one option is required.

    \b
    Examples:
      blockft cache prune out/cache --max-bytes 10GB
      blockft cache prune out/cache --older-than 7d --model out/model
    """
    from blockft.stages.cache import prune_cache

    prune_cache(folder, max_bytes=max_bytes, older_than=older_than, model=model)
