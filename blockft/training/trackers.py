"""Check the trackers of a run before it starts: known, installed, and with a key or offline."""

import netrc
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from blockft.errors import UserError, list_allowed

_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "comet_ml": (
        ("COMET_API_KEY", "COMET_START_ONLINE"),
        ("~/.comet.config", ".comet.config"),
        "COMET_API_KEY",
    ),
    "neptune": (("NEPTUNE_API_TOKEN", "NEPTUNE_MODE"), (), "NEPTUNE_API_TOKEN"),
    "clearml": (
        ("CLEARML_API_ACCESS_KEY", "CLEARML_OFFLINE_MODE"),
        ("~/clearml.conf",),
        "CLEARML_API_ACCESS_KEY",
    ),
    "swanlab": (("SWANLAB_API_KEY", "SWANLAB_MODE"), ("~/.swanlab/.netrc",), "SWANLAB_API_KEY"),
}
"""Trackers that need a key: variables and files that give one or turn it off, and the remedy."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that every tracker is known and installed, and that it will not ask for a key.

    Only the first rank reports to a tracker, so only there a key is needed.

    Raises:
        UserError: a tracker cannot be used.
    """
    if list(names) in (["none"], []):
        return
    known = ("none", *INTEGRATION_TO_CALLBACK)
    for name in names:
        if name not in known:
            raise UserError(f"train.report_to has {name!r} ({list_allowed(name, known)})")
    if "none" in names:
        raise UserError(
            f"train.report_to is [{', '.join(names)}]: none excludes the other trackers; leave out none"
            " or the others"
        )
    if len(set(names)) < len(names):
        raise UserError(f"train.report_to is [{', '.join(names)}]: name each tracker once")
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise UserError(f"train.report_to has {name}, which is not installed: install its Python package")
    if os.environ.get("RANK", "0") == "0":
        for name in names:
            _check_key(name)


def _check_key(name: str) -> None:
    if name == "wandb":
        _check_wandb_key()
    elif name in _KEYS:
        variables, files, remedy = _KEYS[name]
        is_set = any(os.environ.get(variable) for variable in variables)
        if not is_set and not any(Path(file).expanduser().is_file() for file in files):
            raise UserError(f"train.report_to has {name}, but no key is set: set {remedy}")


def _check_wandb_key() -> None:
    import wandb

    try:
        settings = wandb.setup().settings
    except (ValueError, OSError, wandb.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"train.report_to has wandb, whose settings cannot be used: {reason}") from error
    if settings.mode != "online" or settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    hosts = {urlsplit(settings.base_url).hostname or "", "api.wandb.ai"}
    with suppress(OSError, netrc.NetrcParseError):
        path = os.environ.get("NETRC") or str(Path("~/.netrc").expanduser())
        if hosts & netrc.netrc(path).hosts.keys():
            return
    raise UserError(
        "train.report_to has wandb, but no key is set: run wandb login, set WANDB_API_KEY, or set "
        "WANDB_MODE=offline"
    )
