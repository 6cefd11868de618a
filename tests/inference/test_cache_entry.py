"""Files of cached blocks: any change of any byte is found."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockft.inference.block_key import block_key, first_digest, key_digest, num_tokens, token_ids
from blockft.inference.cache_entry import CacheModel, DamagedEntry, EntryReader
from tests.inference.cached import OTHER, TOY, check_file, kv_of, random_key, write_file

KEY = random_key(0)
NAME = f"{key_digest(KEY)}.safetensors"
BEHIND_FIRST = block_key(token_ids(KEY), first=[7, 8, 9])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_file(tmp_path / NAME, KEY)
    return tmp_path / NAME


@pytest.fixture
def path_behind_first(tmp_path: Path) -> Path:
    """The entry of a block that sees a first block."""
    path = tmp_path / f"{key_digest(BEHIND_FIRST)}.safetensors"
    write_file(path, BEHIND_FIRST)
    return path


@pytest.mark.parametrize("model", [TOY, OTHER], ids=lambda model: model.dtype)
@pytest.mark.parametrize("first", [[], [7], [*range(3000)]], ids=len)
@pytest.mark.parametrize("length", [1, 5, 700])
def test_reading_gives_what_was_written(
    tmp_path: Path, model: CacheModel, length: int, first: list[int]
) -> None:
    """The size of an entry does not depend on the first block that its block sees."""
    key = block_key(token_ids(random_key(length, length)), first)
    path = tmp_path / f"{key_digest(key)}.safetensors"
    write_file(path, key, model)
    size = path.stat().st_size
    assert size == model.entry_bytes(length) and model.num_tokens(size) == length
    assert model.num_tokens(size + 1) == model.num_tokens(size - 1) == model.num_tokens(0) == 0
    with EntryReader(path, model) as entry:
        assert entry.tokens == key.tokens and entry.num_tokens == length == num_tokens(key)
        assert entry.first_digest == first_digest(key)
        for index, layer in enumerate(kv_of(key, model)):
            assert torch.equal(entry.read_layer(index), layer)
            out = torch.full_like(layer, 7)
            assert entry.read_layer(index, out) is out and torch.equal(out, layer)


def test_an_entry_is_an_ordinary_safetensors_file(path: Path) -> None:
    tensors = load_file(path)
    assert tensors["token_ids"].tolist() == token_ids(KEY)
    for index, layer in enumerate(kv_of(KEY)):
        assert torch.equal(tensors[f"layers.{index}"], layer)


def test_strided_views_are_written_correctly(tmp_path: Path) -> None:
    from blockft.inference.cache_entry import write_entry

    kv = kv_of(KEY)
    strided = kv.transpose(0, 2).contiguous().transpose(0, 2)
    with (tmp_path / NAME).open("wb", buffering=0) as file, torch.inference_mode():
        write_entry(file, TOY, KEY, strided.clone(memory_format=torch.preserve_format))
    with EntryReader(tmp_path / NAME, TOY) as entry:
        assert torch.equal(entry.read_layer(1), kv[1])


@pytest.mark.parametrize("entry", ["path", "path_behind_first"])
def test_a_flipped_bit_is_found_in_every_byte(entry: str, request: pytest.FixtureRequest) -> None:
    """In the length, the header, its padding, the token ids and every layer."""
    path = request.getfixturevalue(entry)
    content = path.read_bytes()
    for offset in range(len(content)):
        damaged = bytearray(content)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedEntry):
            check_file(path)
    path.write_bytes(content)
    check_file(path)


@pytest.mark.parametrize("name", ['""', '"7"', f'"{"A" * 32}"', f'"{"0" * 32}"', "null", "7", '["a"]', "{}"])
def test_an_entry_that_names_another_first_block_is_damaged(path_behind_first: Path, name: str) -> None:
    path, found = path_behind_first, f'"{first_digest(BEHIND_FIRST)}"'.encode()
    content = path.read_bytes()
    assert content.count(found) == 1
    start = content.index(found)
    rest = content[start + len(found) : 4096].rstrip()
    header = (content[:start] + name.encode() + rest).ljust(4096)
    path.write_bytes(header + content[4096:])
    with pytest.raises(DamagedEntry):
        check_file(path)


def test_an_entry_of_the_same_tokens_behind_another_first_block_is_damaged(
    path: Path, path_behind_first: Path
) -> None:
    behind, alone = path_behind_first.read_bytes(), path.read_bytes()
    path.write_bytes(behind)
    path_behind_first.write_bytes(alone)
    for swapped in (path, path_behind_first):
        with pytest.raises(DamagedEntry):
            check_file(swapped)


def test_a_file_with_another_length_is_damaged(path: Path) -> None:
    content = path.read_bytes()
    per_token = TOY.token_bytes + 4
    lengths = {0, 1, 7, 8, 9, 500, 4095, 4096, 4097, len(content) - 1, *range(4096, len(content), per_token)}
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(DamagedEntry):
            check_file(path)
    for more in (b"\0", bytes(4096), bytes(per_token), content):
        path.write_bytes(content + more)
        with pytest.raises(DamagedEntry):
            check_file(path)


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"[1]",
        b"null",
        b'{"__metadata__": 3}',
        b'{"__metadata__": {}}',
        b"[" * 4000,
        b"\xff" * 4000,
        b"",
    ],
)
def test_a_file_with_another_header_is_damaged(path: Path, header: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + header.ljust(4088) + content[4096:])
    with pytest.raises(DamagedEntry):
        check_file(path)


def test_entries_of_other_blocks_and_models_are_damaged(path: Path) -> None:
    other = path.with_name(f"{key_digest(random_key(1))}.safetensors")
    other.write_bytes(path.read_bytes())
    with pytest.raises(DamagedEntry, match="its block is"):
        EntryReader(other, TOY)
    with pytest.raises(DamagedEntry, match="its model is"):
        EntryReader(path, OTHER)


def test_an_open_entry_is_readable_after_its_file_is_replaced_or_removed(path: Path) -> None:
    with EntryReader(path, TOY) as replaced, EntryReader(path, TOY) as removed:
        other = path.with_name("other")
        other.write_bytes(b"something else")
        other.replace(path)
        replaced.verify()
        path.unlink()
        removed.verify()


def test_a_file_that_shrinks_while_it_is_open_is_damaged(path: Path) -> None:
    with EntryReader(path, TOY) as entry:
        entry.read_layer(0)
        with path.open("r+b") as file:
            file.truncate(4200)
        with pytest.raises(DamagedEntry, match="truncated"):
            entry.verify()
