"""What the front end asks of the connector: parameters of a request, its cache salt, its blocks and pages.

The front end and the connector are parts of one server, with the scheduler of vLLM between them. A request of
the front end carries parameters (`kv_transfer_params`) that hold the server's secret. All other requests are
plain full attention, whatever parameters they carry.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from blockft.inference.block_key import BlockKey, context_keys

_MARK = "blockft-"
_SECRET = re.compile(rb"blockft-[0-9a-f]{16,}")


@dataclass(frozen=True, kw_only=True)
class ReplyAddress:
    """Where the connector reports what it did for a request: a socket of the front end, and an id there."""

    socket: str
    id: str


@dataclass(frozen=True, kw_only=True)
class BlockRequest:
    """A prompt in block mode: the lengths of its local blocks. The other tokens are its final block.

    salt: the cache salt that the request must have.
    """

    lengths: tuple[int, ...]
    salt: str
    reply_to: ReplyAddress

    @property
    def context_len(self) -> int:
        """The number of tokens of all local blocks."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """A prompt that is one block, to be computed and stored. Its first `first_len` tokens are not stored.

    They are those of the first block, if the block sees it. num_blocks: how many blocks are computed
    together, with the same address.
    """

    first_len: int = 0
    num_blocks: int = 1
    reply_to: ReplyAddress


def new_secret() -> str:
    """Return a secret for the processes of one server."""
    return f"{_MARK}{secrets.token_hex(32)}"


def hide_secrets(content: bytes) -> bytes:
    """Return a response of vLLM with `*` in place of secrets and salts. Errors of vLLM quote requests."""
    return _SECRET.sub(lambda found: b"*" * len(found[0]), content)


def block_salt(secret: str, lengths: Sequence[int], client_salt: str = "") -> str:
    """Return the cache salt of a prompt in block mode.

    The pages of a token depend on all tokens before it and on the limits of blocks. vLLM compares the tokens;
    the salt adds the limits, so that no page serves a prompt with other limits or in full mode. Clients do
    not know the secret and cannot name this salt.
    """
    cut = f"{','.join(map(str, lengths))} {client_salt}"
    return f"{_MARK}{hmac.new(secret.encode(), cut.encode(), hashlib.sha256).hexdigest()}"


def encode_salt(secret: str) -> str:
    """Return the cache salt of a prompt that is one block.

    Blocks that see the same first block share its pages, which hold what plain causal attention gives.
    """
    return block_salt(secret, ())


def block_params(secret: str, request: BlockRequest | EncodeRequest) -> dict[str, Any]:
    """Return the parameters of a request for the connector. `parse_params` is the inverse."""
    params = {"secret": secret, "socket": request.reply_to.socket, "id": request.reply_to.id}
    if isinstance(request, EncodeRequest):
        return params | {"encode": True, "first_len": request.first_len, "num_blocks": request.num_blocks}
    return params | {"lengths": list(request.lengths), "salt": request.salt}


def parse_params(params: Any, secret: str) -> BlockRequest | EncodeRequest | None:
    """Return what the front end asks for, or None if the parameters are not from the front end."""
    if not isinstance(params, dict) or not isinstance(given := params.get("secret"), str):
        return None
    if not hmac.compare_digest(given.encode(errors="replace"), secret.encode()):
        return None
    reply_to = ReplyAddress(socket=params["socket"], id=params["id"])
    if params.get("encode"):
        first_len, num_blocks = params["first_len"], params["num_blocks"]
        return EncodeRequest(first_len=first_len, num_blocks=num_blocks, reply_to=reply_to)
    return BlockRequest(lengths=tuple(params["lengths"]), salt=params["salt"], reply_to=reply_to)


def block_keys(
    prompt: Sequence[int], lengths: Sequence[int], *, local_sees_first: bool = False
) -> list[BlockKey]:
    """Return the keys of a prompt's local blocks, from the token ids of the prompt; see `context_keys`."""
    blocks = [prompt[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]
    return context_keys(blocks, local_sees_first=local_sees_first)


def page_slots(pages: Sequence[int], page_len: int, start: int, stop: int) -> torch.Tensor:
    """Return the slots of the tokens `start` to `stop` of a prompt, whose pages are `pages`: (n,) int64.

    ::

        pages (7, 2), page_len 4, tokens 2 to 6  ->  30 31 8 9
    """
    tokens = np.arange(start, stop)
    return torch.from_numpy(np.array(pages)[tokens // page_len] * page_len + tokens % page_len)
