"""`blockft cache`: the folder that keeps blocks for later processes."""

from pathlib import Path
from typing import Annotated

import typer

from blockft.cli.options import CacheBytes, CacheName, cache


@cache.command("build")
def cache_build(
    model: Annotated[str, typer.Argument(help="An export, any model folder, or a Hub id.")],
    corpus: Annotated[
        Path, typer.Argument(help='JSON lines: {"title", "text"}, or texts; - is standard input.')
    ],
    folder: Annotated[Path, typer.Option("--cache", help="The folder of the cache; made if need be.")],
    cache_bytes: CacheBytes = None,
) -> None:
    """Encode the documents of a corpus before anybody asks about them; goes on after a kill."""
    from blockft.stages.cache import build_cache
    from blockft.stages.generate import CacheArguments

    build_cache(model, corpus, CacheArguments(folder=folder, disk=cache_bytes, host="0", device="0"))


@cache.command("stats")
def cache_stats(
    folder: CacheName,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which models' blocks a cache holds, how many, and when they were used."""
    from blockft.stages.cache import print_cache_stats

    print_cache_stats(folder, as_json=as_json)


@cache.command("verify")
def cache_verify(
    folder: CacheName,
    remove: Annotated[bool, typer.Option("--remove", help="Remove damaged entries.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every entry of a cache and compare all checksums."""
    from blockft.stages.cache import verify_cache

    verify_cache(folder, remove=remove, as_json=as_json)


@cache.command("prune")
def cache_prune(
    folder: CacheName,
    max_bytes: Annotated[
        str | None, typer.Option(help="What may stay, as 10GB or 512MiB; least recently used entries go.")
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            help="Remove what was not used for so long, as 7d or 12h; uses are recorded every ten minutes."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Only entries of this model, its name or how its fingerprint begins; alone, all of them."
        ),
    ] = None,
) -> None:
    """Remove entries of a cache, and what killed processes left; one option at least."""
    from blockft.stages.cache import prune_cache

    prune_cache(folder, max_bytes=max_bytes, older_than=older_than, model=model)
