"""`blockft inspect`: an example as JSON and in colour, its mask as a picture, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from blockft.cli import commands
from blockft.config.settings import Recipe
from blockft.data.prepared import load_prepared
from blockft.errors import UserError
from blockft.stages.inspect import draw_mask, inspect
from blockft.stages.prepare import prepare

Make = Callable[..., Recipe]


def test_json_holds_the_blocks_and_token_ids(make_recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(make_recipe())
    capsys.readouterr()
    inspect(out, index=3, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    example = load_prepared(out).examples[3]
    assert (shown["id"], shown["mode"], shown["num_final"]) == ("3", "block", 1)
    assert shown["blocks"][:3] == ["<|im_start|>user\n", "Answer.\n\n", "Fox 1.\n\n"]
    assert shown["blocks"][-1] == "Question 3?<|im_end|>\n<|im_start|>assistant\nThe fox<|im_end|>"
    assert shown["block_lengths"] == list(example.block_lengths)
    assert shown["input_ids"] == example.input_ids.tolist()
    assert shown["labels"] == example.labels.tolist()


def test_an_example_is_shown_with_statistics_and_mask(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(make_recipe(shared_context=True))
    capsys.readouterr()
    inspect(out, png=tmp_path / "mask.png")
    shown = capsys.readouterr().out
    assert "Fox 0." in shown and "Question 1?" in shown and "200 read, 200 kept" in shown
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_where_the_picture_is(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, png = prepare(make_recipe()), tmp_path / "mask.png"
    commands.inspect(out, png=png)
    assert capsys.readouterr().err == f"picture: {png}\n"


def test_statistics_have_singular_nouns(make_recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe()
    record = {
        "id": "0",
        "source": "s",
        "messages": [{"role": "user", "content": ["Why?"]}],
        "response": "So.",
    }
    Path(recipe.data.sources[0].path).write_text(json.dumps(record) + "\n")
    inspect(prepare(recipe))
    shown = capsys.readouterr().out
    assert "tokens in 1 block\n" in shown and "examples of 1 block " in shown


def test_wrong_arguments_are_refused(make_recipe: Make, tmp_path: Path) -> None:
    out = prepare(make_recipe())
    for index in (-1, 200):
        with pytest.raises(UserError, match="0 to 199"):
            inspect(out, index=index)
    with pytest.raises(UserError, match="blockft prepare"):
        inspect(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be written"):
        inspect(out, png=tmp_path / "none" / "mask.png")


def test_copies_of_the_first_block_are_shown(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(make_recipe(local_sees_first=True))
    example = load_prepared(out).examples[3]
    first = example.block_lengths[0]
    capsys.readouterr()
    inspect(out, index=3, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["blocks"][:2] == ["<|im_start|>user\nAnswer.\n\n", "Fox 1.\n\n"]
    assert (shown["num_first_copies"], shown["num_row_tokens"]) == (2, len(example) + 2 * first)
    inspect(out, index=3)
    text = capsys.readouterr().out
    assert f"in 4 blocks; 2 copies of block 1 add {2 * first} tokens to a row" in text
    assert text.count("after a copy of block 1]") == 2
    page = tmp_path / "page.html"
    inspect(out, html=page)
    html = page.read_text()
    assert "itself and to a copy of the first block" in html and "after a copy of block 1" in html
    assert f"copies of block 1 add {2 * first} tokens" in html and "data.local_sees_first" in html


def test_data_without_copies_show_none(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(make_recipe())
    capsys.readouterr()
    inspect(out, index=3, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["num_first_copies"], shown["num_row_tokens"]) == (0, len(shown["input_ids"]))
    inspect(out, index=3)
    inspect(out, html=tmp_path / "page.html")
    assert "copy" not in capsys.readouterr().out and "copy of" not in (tmp_path / "page.html").read_text()


def test_the_mask_picture_shows_copies_in_a_colour_of_their_own(make_recipe: Make) -> None:
    example = load_prepared(prepare(make_recipe(local_sees_first=True))).examples[3]
    axes = draw_mask(example, local_sees_first=True).axes[0]
    names = ["block 1", "copy of block 1", "block 2", "copy of block 1", "block 3", "final block"]
    assert [label.get_text() for label in reversed(axes.get_xticklabels())] == names
    drawn, first = axes.images[0].get_array(), example.block_lengths[0]
    assert drawn.shape == (len(example) + 2 * first,) * 2
    assert (drawn[first : 2 * first, first] == 3).all() and (drawn[2 * first, first : 2 * first] == 3).all()
    assert not drawn[-1, first : 2 * first].any() and drawn[-1, 0] == 2 and drawn[0, 0] == 1
    (legend,) = axes.figure.legends
    assert "a copy of block 1, seen by the block after it" in [t.get_text() for t in legend.get_texts()]


def test_the_mask_picture_names_its_blocks(make_recipe: Make) -> None:
    examples = load_prepared(prepare(make_recipe())).examples
    axes = draw_mask(examples[3]).axes[0]
    names = ["block 1", "block 2", "block 3", "block 4", "final block"]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in reversed(labels)] == names
    assert axes.get_title().startswith("3: ")
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "a block attends to itself",
        "the final block attends to all blocks",
    ]
