"""The Hugging Face Hub: a check that it can be reached, and the library that sends its requests."""

import os
import time
from functools import cache
from importlib import import_module
from types import ModuleType

from blockft.errors import UserError, first_line, warn

CONNECT_TIMEOUT_S = 5.0
RETRY_AFTER_S = 1.0


def http_library() -> ModuleType:
    """Return the package that sends the requests of huggingface_hub: httpx or httpx2, by its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return import_module(HfHubHTTPError.__bases__[0].__module__)


def check_hub(name: str, model: str | None = None, revision: str | None = None) -> None:
    """Check that the Hub can be reached, because a library would try for minutes to read `name` from it.

    A Hub that answers slowly or with errors passes: the library repeats these requests. Without a network
    the check takes seconds; a success is remembered. If the Hub's cache has the configuration of `model` in
    this revision, a warning is printed instead of an error, and this process and those that it starts use
    the cache alone from then on.

    Raises:
        UserError: no connection to the Hub can be made.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    http = http_library()
    refused = (http.ConnectError, http.ConnectTimeout, http.ProxyError, http.UnsupportedProtocol)
    try:
        _connect()
    # ValueError, InvalidURL, ImportError: an address, or a proxy, that the library cannot use
    except (*refused, http.InvalidURL, ValueError, ImportError) as error:
        problem = f"the Hugging Face Hub ({constants.ENDPOINT}) cannot be reached ({first_line(error)})"
        if model is None or not _is_cached(model, revision):
            raise UserError(
                f"{name} does not exist here, and {problem}: name a local folder, or set HF_HUB_OFFLINE=1 to "
                "use the Hub's cache"
            ) from error
        warn(
            f"{problem}: its cache is used, for {name} and all else from there (HF_HUB_OFFLINE=1 does so at "
            "once)"
        )
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
    except http.TransportError:  # there is a connection, but no answer
        return


def _is_cached(model: str, revision: str | None) -> bool:
    """Return whether the Hub's cache has the configuration of a model. Its other files may be missing."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)
    except ValueError:  # no name of the Hub
        return False


@cache  # keeps no errors
def _connect() -> None:
    from huggingface_hub import constants, get_session

    def request() -> None:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S, follow_redirects=False)

    http = http_library()
    try:
        request()
    except (http.ConnectError, http.ProxyError):  # name servers and proxies fail now and then
        time.sleep(RETRY_AFTER_S)
        request()
