"""A Hub that cannot be reached is an error of one line; a slow or failing one is left to the libraries."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import pytest
from huggingface_hub import close_session, constants, file_download

from blockft import hub_access
from blockft.data.records import read_hub
from blockft.errors import UserError
from blockft.hub_access import check_hub
from blockft.model.load import load_config, load_tokenizer
from blockft.stages.part_options import identify_model
from tests.readmes import DEMO_MODEL


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask the Hub, at once again, and forget afterwards what it answered."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
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


@pytest.mark.usefixtures("refusing")
def test_a_source_is_read_from_the_cache_of_datasets_if_that_library_is_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "a"}])
    assert [record for _, record in read_hub("owner/name", "train")] == [{"text": "a"}]


@pytest.mark.parametrize("revision", [None, "a" * 40])
def test_a_model_in_the_cache_is_used_with_a_warning(
    revision: str | None,
    tmp_path: Path,
    refusing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repository = tmp_path / "models--owner--name"
    shutil.copytree(DEMO_MODEL, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(file_download, "http_backoff", pytest.fail, raising=False)
    for name in ("owner/other", "owner/a b"):
        with pytest.raises(UserError, match="cannot be reached"):
            load_config(name, revision)
    assert load_config("owner/name", revision) and load_tokenizer("owner/name", revision)
    assert capsys.readouterr().err == (
        f"blockft: warning: the Hugging Face Hub ({refusing}) cannot be reached ([Errno 111] Connection "
        "refused): its cache is used, for model 'owner/name' and all else from there (HF_HUB_OFFLINE=1 does "
        "so at once)\n"
    )
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    "address", ["huggingface.example", "http://[bad", "http://a..b", "http://127.0.0.1:99999"]
)
def test_an_address_that_cannot_be_used_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with pytest.raises(UserError, match=f"Hub \\({re.escape(address)}\\) cannot be reached"):
        check_hub("source a/b")
    assert identify_model("owner/name") is None


def test_a_proxy_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:9")
    close_session()  # which took the proxies of an earlier moment
    with pytest.raises(UserError, match=r"cannot be reached \(Unknown scheme for proxy URL"):
        check_hub("source a/b")
