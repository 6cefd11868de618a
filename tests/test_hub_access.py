"""A Hub that cannot be reached or does not answer is an error of one line, and is waited for with a line."""

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
from blockft.model.model_files import verify_model_files
from blockft.stages.part_options import identify_model
from tests.readmes import DEMO_MODEL


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask the Hub, at once again, and forget afterwards what it answered."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub_access, "RETRY_AFTER_S", 0)
    hub_access._wait_for_answer.cache_clear()
    yield
    hub_access._wait_for_answer.cache_clear()


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


Answer = Callable[[BaseHTTPRequestHandler], None]


def status(number: int) -> Answer:
    """Return an answer with a status and without content."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(number)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def hang(handler: BaseHTTPRequestHandler) -> None:
    """Wait until the client has gone."""
    handler.rfile.read(1)


def close(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, *answers: Answer) -> Iterator[tuple[str, list[str]]]:
    """Run a Hub that gives some answers in turn, the last one again and again; yield what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            answers[min(len(asked), len(answers)) - 1](self)

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield set_endpoint(monkeypatch, server.server_port), asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_name_server_may_fail_once(monkeypatch: pytest.MonkeyPatch, refusing: str) -> None:
    with hub(monkeypatch, status(200)) as (address, asked):
        monkeypatch.setattr(constants, "ENDPOINT", refusing)
        monkeypatch.setattr("time.sleep", lambda _: monkeypatch.setattr(constants, "ENDPOINT", address))
        check_hub("source a/b")
    assert asked == ["/"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits for no answer for long."""
    monkeypatch.setattr(hub_access, "CONNECT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    monkeypatch.setattr(hub_access, "ANSWER_WAIT_S", 0.3)


@pytest.mark.parametrize("number", [200, 307, 401, 404, 405, 429, 500, 501])
def test_any_answer_of_a_hub_passes_and_is_asked_for_once(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub(monkeypatch, status(number)) as (_, asked):
        check_hub("source a/b")
        check_hub("source c/d")
    assert asked == ["/"] and capsys.readouterr().err == ""


def test_what_will_be_read_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(monkeypatch, status(401)) as (_, asked):
        for _ in range(2):
            check_hub("model a/b", "a/b")
            check_hub("model a/b", "a/b", "v1")
            check_hub("source a/b", dataset="a/b")
            check_hub("model a b/c?", "a b/c?")
    assert asked == [
        "/a/b/resolve/main/config.json",
        "/a/b/resolve/v1/config.json",
        "/api/datasets/a/b",
        "/a%20b/c%3F/resolve/main/config.json",
    ]


def test_a_mirror_that_names_no_reason_for_a_missing_file_has_answered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The Hub names it in a header, which mirrors leave out."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for answer, refused in (
        (status(404), nullcontext()),
        (status(403), pytest.raises(UserError, match=r"not say whether it has digests\.json \(403 ")),
    ):
        with hub(monkeypatch, answer) as (address, asked), refused:
            template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            verify_model_files("owner/name", weights=True)
        assert "/owner/name/resolve/main/digests.json" in asked


WITHOUT_ANSWER = {
    "does not answer": hang,
    "answers with the error 502": status(502),
    "answers with the error 503": status(503),
    "answers with the error 504": status(504),
    "closes connections (Server disconnected without sending a response.)": close,
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("problem", WITHOUT_ANSWER)
def test_a_hub_without_an_answer_is_waited_for_with_one_line_and_then_refused(
    problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub(monkeypatch, WITHOUT_ANSWER[problem]) as (address, asked):
        with pytest.raises(UserError, match=re.escape(f"Hub ({address}) cannot be reached (it {problem}): ")):
            check_hub("source a/b")
        assert len(asked) > 1 and {*asked} == {"/"}
        assert capsys.readouterr().err == (
            f"blockft: the Hugging Face Hub ({address}) {problem}: it is waited for up to 0.3 s "
            "(HF_HUB_OFFLINE=1 uses its cache at once)\n"
        )
        with pytest.raises(UserError, match="model 'owner/name' does not exist here, and the Hugging Face"):
            load_config("owner/name")


@pytest.mark.parametrize("problem", WITHOUT_ANSWER)
def test_a_hub_that_answers_after_a_while_is_used(
    problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub_access, "CONNECT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    monkeypatch.setattr(hub_access, "ANSWER_WAIT_S", 600)
    with hub(monkeypatch, *[WITHOUT_ANSWER[problem]] * 3, status(200)) as (_, asked):
        check_hub("source a/b")
        check_hub("source a/b")
    assert len(asked) >= 4 and capsys.readouterr().err.count("\n") == 1


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
