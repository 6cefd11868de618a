"""The Hugging Face Hub: a check that it can be reached, and the library that sends its requests."""

import os
import time
from functools import cache
from importlib import import_module
from types import ModuleType
from urllib.parse import quote

from blockft.errors import UserError, first_line, notify, warn

CONNECT_TIMEOUT_S = 5.0
RETRY_AFTER_S = 1.0

ANSWER_WAIT_S = 30.0
"""Least time that a Hub is waited for which accepts connections, but is overloaded or does not answer. A
larger HF_HUB_ETAG_TIMEOUT, the time that huggingface_hub waits for an answer, counts instead."""

_UNAVAILABLE = {502, 503, 504}
"""HTTP status of a server that does not work at the moment. Others, also errors, are answers of the Hub."""


class HubUnavailable(Exception):
    """The Hub accepts connections, but does not answer requests."""


def http_library() -> ModuleType:
    """Return the package that sends the requests of huggingface_hub: httpx or httpx2, by its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return import_module(HfHubHTTPError.__bases__[0].__module__)


def check_hub(
    name: str, model: str | None = None, revision: str | None = None, *, dataset: str | None = None
) -> None:
    """Check that the Hub can be reached, because a library would try for minutes to read `name` from it.

    Without a network the check takes seconds. A Hub that is overloaded, or accepts connections and does not
    answer, is waited for with a line on stderr: a library would repeat each of its requests for longer. Any
    answer passes, also that there is no such model. A success is remembered.

    If the Hub's cache has the configuration of `model` in this revision, a warning is printed instead of an
    error, and this process and those that it starts use the cache alone from then on.

    Raises:
        UserError: no connection to the Hub can be made, or it does not answer.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    http = http_library()
    refused = (http.ConnectError, http.ConnectTimeout, http.ProxyError, http.UnsupportedProtocol)
    try:
        _wait_for_answer(_address(model, revision, dataset))
    # ValueError, InvalidURL, ImportError: an address, or a proxy, that the library cannot use
    except (*refused, http.InvalidURL, ValueError, ImportError, HubUnavailable) as error:
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


def _is_cached(model: str, revision: str | None) -> bool:
    """Return whether the Hub's cache has the configuration of a model. Its other files may be missing."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)
    except ValueError:  # no name of the Hub
        return False


def _address(model: str | None, revision: str | None, dataset: str | None) -> str:
    """Return the path of what will be asked for, because a part of the Hub may fail alone."""
    if model is not None:
        return quote(f"/{model}/resolve/{revision or 'main'}/config.json")
    return "" if dataset is None else quote(f"/api/datasets/{dataset}")


@cache  # keeps no errors
def _wait_for_answer(address: str) -> None:
    """Return as soon as the Hub answers, and say on stderr if it is waited for. `address` is a path of it.

    Raises:
        HubUnavailable: the Hub is overloaded or does not answer in time.
    """
    from huggingface_hub import constants

    problem = _find_problem(address, CONNECT_TIMEOUT_S)
    if problem is None:
        return
    wait_s = max(ANSWER_WAIT_S, constants.HF_HUB_ETAG_TIMEOUT)
    notify(
        f"the Hugging Face Hub ({constants.ENDPOINT}) {problem}: it is waited for up to {wait_s:g} s "
        "(HF_HUB_OFFLINE=1 uses its cache at once)"
    )
    deadline = time.monotonic() + wait_s
    while problem and (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(RETRY_AFTER_S, left_s))
        problem = _find_problem(address, min(constants.HF_HUB_ETAG_TIMEOUT, max(left_s, 1)))
    if problem:
        raise HubUnavailable(f"it {problem}")


def _find_problem(address: str, timeout_s: float) -> str | None:
    """Ask the Hub for a header; return why there is no answer, or None.

    Raises an error of the library if no connection can be made.
    """
    from huggingface_hub import constants, get_session

    def request() -> int:
        url = f"{constants.ENDPOINT}{address}"
        return int(get_session().head(url, timeout=timeout_s, follow_redirects=False).status_code)

    http = http_library()
    try:
        try:
            status = request()
        except (http.ConnectError, http.ProxyError):  # name servers and proxies fail now and then
            time.sleep(RETRY_AFTER_S)
            status = request()
    except (http.ConnectError, http.ConnectTimeout, http.ProxyError, http.UnsupportedProtocol):
        raise
    except http.TimeoutException:
        return "does not answer"
    except http.TransportError as error:
        return f"closes connections ({first_line(error)})"
    return f"answers with the error {status}" if status in _UNAVAILABLE else None
