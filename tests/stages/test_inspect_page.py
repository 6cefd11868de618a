"""`blockft inspect --html`: one file without scripts or references; its numbers are those of the manifest."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockft.cli import commands
from blockft.config.choices import Format
from blockft.config.settings import Recipe, Source
from blockft.data.prepared import load_prepared
from blockft.data.sample import sample_to_record
from blockft.errors import UserError
from blockft.printable import printable
from blockft.stages.inspect import choose_examples, inspect
from blockft.stages.prepare import prepare
from tests.commands import TIMEOUT_S
from tests.data.toys import rag_sample

Make = Callable[..., Recipe]

HOSTILE = (
    "<script>alert(1)</script></style><style>*{display:none}</style><!-- <img src=http://x onerror=y> "
    "&lt;b&gt; \"' {{ 7 * 7 }} {% raw %} \x1b[2J \u202e back \u2066 \u200b \ufeff \r ]]></div></main>"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "wbr"}
KNOWN = VOID | {
    *("html", "head", "title", "style", "body", "header", "main", "footer", "section", "nav", "div"),
    *("p", "h1", "h2", "h3", "a", "dl", "dt", "dd", "ul", "li", "span", "b", "i", "mark", "pre"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure", "figcaption"),
    *("svg", "g", "rect", "line"),
}


class Parser(HTMLParser):
    """The elements of a page: (name, attributes, text inside), and whether they are nested correctly."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), [""])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), [""]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text[0] += data

    def find(self, tag: str, css_class: str = "") -> list[str]:
        """The texts of all elements of a kind."""
        return [
            text[0]
            for name, attributes, text in self.elements
            if name == tag and css_class in (attributes.get("class") or "").split() + [""]
        ]


def write_page(folder: Path, html: Path, **options: Any) -> Parser:
    inspect(folder, html=html, **options)
    return Parser(html.read_text(encoding="utf-8"))


def hostile_recipe(make_recipe: Make, tmp_path: Path) -> Recipe:
    """A recipe whose paths, ids and texts try to act on the page; its second source is dropped whole."""
    folder = tmp_path / "<b>&'[bold]\u202e\x1b"
    folder.mkdir()
    samples = [
        rag_sample(f"Q{i} {HOSTILE}?", (f"{i} {HOSTILE}\n\n", "\t  two \n\n"), id=f"{i}{HOSTILE}")
        for i in range(4)
    ]
    long = [rag_sample("long? " + "x" * 5000, id=f"long{i}{HOSTILE}") for i in range(5)]
    for name, records in (("a.jsonl", samples), ("b.jsonl", long)):
        lines = [json.dumps(sample_to_record(sample)) for sample in records]
        (folder / name).write_text("\n".join(lines))
    sources = [Source(format=Format.samples, path=str(folder / name)) for name in ("a.jsonl", "b.jsonl")]
    return make_recipe(sources=sources)


def test_the_numbers_are_those_of_the_manifest(make_recipe: Make, tmp_path: Path) -> None:
    out = prepare(make_recipe(row_len=100))
    manifest = load_prepared(out).manifest
    page = write_page(out, tmp_path / "page.html")
    tiles = dict(zip(page.find("dt"), page.find("dd"), strict=True))
    assert tiles["samples"] == f"{manifest['num_samples']:,}"
    assert tiles["tokens"] == f"{manifest['num_tokens']:,}"
    assert tiles["of them labels"] == f"{manifest['num_labels'] / manifest['num_tokens']:.1%}"
    (source,) = manifest["sources"]
    cells = page.find("td")[:9]
    dropped = sum(source["dropped"].values())
    assert cells[1:5] == [str(source["read"]), str(source["samples"]), str(source["kept"]), str(dropped)]
    (number,) = page.find("span", "number")
    assert int(number) == dropped == 200 - manifest["num_samples"]
    rows, drops = page.find("li")[:2]
    assert rows.startswith("rows are 8") and drops.startswith(f"{source['path']}: {dropped} of 200 dropped")
    assert source["drop_examples"]["too long"][0] in page.find("ul", "examples")[0]


def test_text_of_users_is_escaped_and_can_be_seen(make_recipe: Make, tmp_path: Path) -> None:
    recipe = hostile_recipe(make_recipe, tmp_path)
    out, html = prepare(recipe), tmp_path / "page.html"
    page = write_page(out, html)
    names = {name for name, _, _ in page.elements}
    assert names <= KNOWN
    (style,) = [text[0] for name, _, text in page.elements if name == "style"]
    assert HOSTILE not in style and "display:none}" not in style
    content = html.read_text(encoding="utf-8")
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", content
    )
    shown = HOSTILE
    for character in "\x1b\u202e\u2066\u200b\ufeff\r":
        shown = shown.replace(character, f"U+{ord(character):04X}")
    blocks = page.find("div", "text")
    assert f"0 {shown}\n\n" in blocks and "\t  two \n\n" in blocks
    assert any(shown in text for text in page.find("span", "id"))
    assert "long0" in page.find("ul", "examples")[0]
    (title,) = [a["title"] for name, a, text in page.elements if name == "th" and text == ["a.jsonl"]]
    assert title == printable(recipe.data.sources[0].path)


def test_the_page_refers_to_nothing_outside_of_it(make_recipe: Make, tmp_path: Path) -> None:
    page = write_page(prepare(make_recipe()), tmp_path / "page.html")
    for name, attributes, _ in page.elements:
        assert (
            not {"src", "style", "srcset", "data", "action", "background", "xlink:href"} & attributes.keys()
        )
        assert not any(key.startswith("on") for key in attributes)
        assert attributes.get("href", "#").startswith("#"), name  # type: ignore[union-attr]
    (style,) = page.find("style")
    assert "url(" not in style and "@import" not in style
    ids = {attributes["id"] for _, attributes, _ in page.elements if "id" in attributes}
    assert {f"#{id}" for id in ids} == {a["href"] for name, a, _ in page.elements if name == "a"}


def test_equal_folders_and_seeds_give_equal_pages(make_recipe: Make, tmp_path: Path) -> None:
    out = prepare(make_recipe())
    pages = []
    for seed in (0, 0, 1):
        inspect(out, html=tmp_path / "page.html", seed=seed, num_samples=3)
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1] != pages[2]


def test_the_example_of_the_index_comes_first(make_recipe: Make, tmp_path: Path) -> None:
    out = prepare(make_recipe())
    page = write_page(out, tmp_path / "page.html", index=150, num_samples=3)
    shown = page.find("span", "where")
    assert len(shown) == 3 and shown[0].startswith("example 150 of ")
    assert len({*shown}) == 3
    for num_samples, number in ((0, 1), (1, 1)):
        again = write_page(out, tmp_path / "page.html", index=150, num_samples=num_samples)
        assert len(again.find("span", "where")) == number
    assert not write_page(out, tmp_path / "page.html", num_samples=0).find("span", "where")


@pytest.mark.parametrize(("num_blocks", "style"), [(60, "strip"), (61, "strip dense")])
def test_the_strip_of_many_blocks_has_no_gaps_that_would_hide_them(
    make_recipe: Make, tmp_path: Path, num_blocks: int, style: str
) -> None:
    # the chat template is a block of its own
    blocks = [f"Block {i}." for i in range(num_blocks - 1)]
    path = tmp_path / "samples.jsonl"
    record = {"id": "a", "source": "s", "messages": [{"role": "user", "content": blocks}], "response": "x"}
    path.write_text(json.dumps(record))
    out = prepare(make_recipe(sources=[Source(format=Format.samples, path=str(path))]))
    page = write_page(out, tmp_path / "page.html")
    styles = [attributes.get("class") for tag, attributes, _ in page.elements if tag == "svg"]
    assert styles[-1] == style
    assert f" in {num_blocks} blocks" in page.find("span", "size")[0]


def test_all_sources_are_among_the_examples() -> None:
    sources = np.repeat([0, 1, 3], [1000, 3, 1])
    chosen = choose_examples(sources, 6, seed=0)
    assert chosen == sorted({*chosen}) and len(chosen) == 6
    assert [sources[chosen].tolist().count(source) for source in (0, 1, 3)] == [3, 2, 1]
    assert len(choose_examples(sources, 5000, seed=0)) == 1004
    assert 1003 not in choose_examples(sources, 2000, seed=0, leave_out=1003)
    assert choose_examples(sources, -1, seed=0) == []


def test_the_command_writes_the_page_and_says_where(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, html = prepare(make_recipe()), tmp_path / "page.html"
    capsys.readouterr()
    for _ in range(2):  # an earlier page is replaced
        commands.inspect(out, html=html)
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", f"page: {html}\n")


def test_a_page_replaces_no_other_file_and_damages_no_folder(make_recipe: Make, tmp_path: Path) -> None:
    out, notes = prepare(make_recipe()), tmp_path / "notes.md"
    notes.write_text("mine")
    (tmp_path / "link.html").symlink_to(out / "page.html")
    for path, message in (
        (notes, "is not an HTML page"),
        (out / "page.html", "can hold no other files"),
        (tmp_path / "link.html", "can hold no other files"),
        (tmp_path / "none" / "page.html", "cannot be written"),
        (tmp_path, "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            inspect(out, html=path)
    with pytest.raises(UserError, match="can hold no other files"):
        inspect(out, png=out / "mask.png")
    with pytest.raises(UserError, match="the same file"):
        inspect(out, png=tmp_path / "x.html", html=tmp_path / "x.html")
    for options in ({"num_samples": 0}, {"seed": 0}):
        with pytest.raises(UserError, match="add --html FILE"):
            inspect(out, **options)
    assert notes.read_text() == "mine"
    load_prepared(out)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_the_page_without_an_error(make_recipe: Make, tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    inspect(prepare(hostile_recipe(make_recipe, tmp_path)), html=html)
    assert CHROMIUM
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,1200"]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", html.as_uri()], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    assert "Nothing to change" in done.stdout or "What to change" in done.stdout
