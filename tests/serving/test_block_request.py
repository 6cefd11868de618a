"""Parameters of requests, salts, keys and slots: what the front end and the connector agree on."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.inference.block_key import block_key, token_ids
from blockft.serving.block_request import (
    BlockRequest,
    EncodeRequest,
    ReplyAddress,
    block_keys,
    block_params,
    block_salt,
    encode_salt,
    hide_secrets,
    new_secret,
    page_slots,
    parse_params,
)
from tests.serving.stubs import NOWHERE, SECRET

REQUEST = BlockRequest(lengths=(3, 4), salt=block_salt(SECRET, (3, 4)), reply_to=NOWHERE)


ENCODE = EncodeRequest(reply_to=ReplyAddress(socket="s", id="9"))


@pytest.mark.parametrize("request_", [REQUEST, ENCODE, replace(ENCODE, first_len=7, num_blocks=3)])
def test_parameters_are_read_back(request_: BlockRequest | EncodeRequest) -> None:
    assert parse_params(block_params(SECRET, request_), SECRET) == request_


@pytest.mark.parametrize(
    "params",
    [
        *(None, {}, [], "blocks", 7, {"secret": 3}, {"secret": "another"}, {"secret": "\ud800"}),
        {"lengths": [3]},
        block_params("another", REQUEST),
    ],
)
def test_parameters_without_the_secret_ask_for_nothing(params: Any) -> None:
    assert parse_params(params, SECRET) is None


def test_a_salt_is_that_of_its_block_limits_its_client_and_its_server_alone() -> None:
    limits = [(3, 4), (4, 3), (34,), (3, 4, 1), (3,)]
    salts = [block_salt(secret, n, client) for n in limits for client in ("", "a") for secret in ("x", "y")]
    salts += [encode_salt("x"), encode_salt("y")]
    assert len(set(salts)) == len(salts)
    assert all(3 < len(salt) < 1024 for salt in salts), "vLLM takes salts of 1 to 1,024 characters"


def test_the_keys_of_a_prompt_are_those_of_its_local_blocks() -> None:
    keys = block_keys([5, 6, 7, 8, 9, 10], (2, 1))
    assert [token_ids(key) for key in keys] == [[5, 6], [7]] and not any(key.first for key in keys)
    seeing = block_keys([5, 6, 7, 8, 9, 10], (2, 1), local_sees_first=True)
    assert seeing == [block_key([5, 6]), block_key([7], [5, 6])]


@given(st.permutations(range(6)), st.integers(1, 5), st.data())
def test_slots_are_those_of_the_tokens_of_a_prompt(pages: list[int], page_len: int, data: Any) -> None:
    start = data.draw(st.integers(0, 6 * page_len - 1))
    stop = data.draw(st.integers(start, 6 * page_len))
    every = [page * page_len + token for page in pages for token in range(page_len)]
    assert page_slots(pages, page_len, start, stop).tolist() == every[start:stop]


def test_a_response_shows_no_secret_and_no_salt() -> None:
    """Errors of vLLM quote requests, possibly cut off."""
    secret, salt = new_secret(), block_salt(SECRET, (3, 4))
    content = f'{{"secret": "{secret}", "salt": "{salt[:40]}...", "model": "blockft-1b"}}'.encode()
    hidden = hide_secrets(content)
    assert len(hidden) == len(content)
    assert secret[:24] not in hidden.decode() and salt[:24] not in hidden.decode()
    assert b"blockft-1b" in hidden
