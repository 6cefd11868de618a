"""A Hub that cannot be reached is an error of one line; a slow or failing one is left to the libraries."""

import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

from blockft import hub_access
from blockft.data.records import read_hub
from blockft.errors import UserError
from blockft.hub_access import check_hub
from blockft.model.load import load_config, load_tokenizer
from blockft.stages.part_options import identify_model


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask the Hub, at once again, and forget afterwards what it answered."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "RETRY_AFTER_S", 0)
    hub_access._connect.cache_clear()
    yield
    hub_access._connect.cache_clear()


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Hub that refuses connections: a port that is bound, but nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield set_endpoint(monkeypatch, bound.getsockname()[1])


def set_endpoint(monkeypatch: pytest.MonkeyPatch, port: int) -> str:
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    return address


class Unavailable(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_hub_that_refuses_connections_is_an_error_that_says_what_to_do(refusing: str) -> None:
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(UserError) as caught:
            check_hub("source a/b")
        assert str(caught.value) == (
            f"source a/b does not exist here, and the Hugging Face Hub ({refusing}) cannot be reached "
            "([Errno 111] Connection refused): name a local folder, or set HF_HUB_OFFLINE=1 to use the Hub's "
            "cache"
        )


@pytest.mark.usefixtures("refusing")
def test_every_reader_of_the_hub_checks_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_: Any, **__: Any) -> None:
        raise AssertionError("a library asks the Hub again and again")

    monkeypatch.setattr("huggingface_hub.file_download.http_backoff", wait, raising=False)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", wait)
    monkeypatch.setattr("datasets.load_dataset", wait)
    for read in (load_config, load_tokenizer):
        with pytest.raises(
            UserError, match="model 'owner/name' does not exist here, and the Hugging Face Hub"
        ):
            read("owner/name")
    with pytest.raises(UserError, match="source owner/name does not exist here, and the Hugging Face Hub"):
        next(read_hub("owner/name", "train"))


@pytest.mark.usefixtures("refusing")
def test_the_revision_on_a_hub_that_refuses_connections_is_unknown() -> None:
    assert identify_model("owner/name") is None


def test_a_name_server_may_fail_once(monkeypatch: pytest.MonkeyPatch, refusing: str) -> None:
    with HTTPServer(("127.0.0.1", 0), Unavailable) as server:
        Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr("time.sleep", lambda _: set_endpoint(monkeypatch, server.server_port))
        check_hub("source a/b")


def test_a_hub_that_is_overloaded_is_reached_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Unavailable) as server:
        set_endpoint(monkeypatch, server.server_port)
        Thread(target=server.handle_request, daemon=True).start()
        check_hub("source a/b")
    check_hub("source a/b")


def test_a_hub_that_accepts_connections_and_does_not_answer_is_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_access, "CONNECT_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        set_endpoint(monkeypatch, silent.getsockname()[1])
        check_hub("source a/b")


@pytest.mark.usefixtures("refusing")
def test_no_hub_is_needed_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_hub("source a/b")


def test_an_address_without_a_scheme_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "huggingface.example")
    with pytest.raises(UserError, match="Hub \\(huggingface.example\\) cannot be reached"):
        check_hub("source a/b")
