"""The Hugging Face Hub: a check that it can be reached, and the library that sends its requests."""

import time
from functools import cache
from importlib import import_module
from types import ModuleType

from blockft.errors import UserError, first_line

CONNECT_TIMEOUT_S = 5.0
RETRY_AFTER_S = 1.0


def http_library() -> ModuleType:
    """Return the package that sends the requests of huggingface_hub: httpx or httpx2, by its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return import_module(HfHubHTTPError.__bases__[0].__module__)


def check_hub(name: str) -> None:
    """Check that the Hub can be reached, because a library would try for minutes to read `name` from it.

    A Hub that answers slowly or with errors passes: the library repeats these requests. Without a network
    the check takes seconds; a success is remembered.

    Raises:
        UserError: no connection to the Hub can be made.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    http = http_library()
    try:
        _connect()
    except (http.ConnectError, http.ConnectTimeout, http.ProxyError, http.UnsupportedProtocol) as error:
        raise UserError(
            f"{name} does not exist here, and the Hugging Face Hub ({constants.ENDPOINT}) cannot be reached "
            f"({first_line(error)}): name a local folder, or set HF_HUB_OFFLINE=1 to use the Hub's cache"
        ) from error
    except http.TransportError:  # there is a connection, but no answer
        return


@cache  # keeps no errors
def _connect() -> None:
    from huggingface_hub import constants, get_session

    def request() -> None:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S, follow_redirects=False)

    try:
        request()
    except http_library().ConnectError:  # name servers fail now and then
        time.sleep(RETRY_AFTER_S)
        request()
