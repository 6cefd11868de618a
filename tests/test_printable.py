"""Text of users is printed as it is: no markup, no emoji codes, no control of the terminal."""

import io
import json
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.table import Table

from blockft.console import PlainConsole
from blockft.errors import warn
from blockft.markdown import code_block, code_span, escape_markdown, markdown_table
from blockft.outputs import plain_label, save_figure
from blockft.printable import print_answer, print_text, printable
from blockft.progress import progress

MARKUP = "out/q[/b] [red]x[/red] :smile: [link=a]"
CONTROLS = "\x1b[2J\r\x07\x9b31m\u202e\u2066\u2028\x7f\udc80\0"
ESCAPED = r"\u001b[2J\u000d\u0007\u009b31m\u202e\u2066\u2028\u007f\udc80\u0000"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_control_characters_are_escaped() -> None:
    assert printable(CONTROLS) == ESCAPED
    unchanged = "tab\t, line\n, é, 漢字, \U0001f468\u200d\U0001f469, نص\u200cعربي, \\u001b"
    assert printable(unchanged) == unchanged


@given(st.text())
def test_printed_text_is_unicode_without_controls_and_json_keeps_its_meaning(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert all(c.isprintable() or c in "\n\t" or c.isspace() or not c.isascii() for c in shown)
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text


def test_lines_tables_titles_and_bars_show_markup_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    console = PlainConsole()
    console.print(MARKUP + CONTROLS, soft_wrap=True)
    table = Table(f"column {MARKUP}", title=f"title {MARKUP}", caption=f"caption {MARKUP}")
    table.add_row(f"cell {MARKUP}{CONTROLS}")
    console.print(table)
    with progress(f"bar {MARKUP}{CONTROLS}", 2, unit="item") as advance:
        advance(1)
    with progress(f"counter {MARKUP}", unit="item") as add:
        add(3)
    warn(f"warning {MARKUP}{CONTROLS}")
    print_text(f"printed {MARKUP}{CONTROLS}")
    found = terminal.getvalue()
    for label in ("column", "title", "caption", "cell", "bar", "counter", "warning", "printed"):
        assert f"{label} {MARKUP}" in found, label
    assert "\x1b[2J" not in found and not set(found) & {"\x07", "\x9b", "\u202e", "\udc80", "\0"}
    assert found.count(r"\u001b[2J") >= 5


def test_an_answer_is_escaped_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_answer("\x1b[2J", end="")
    assert capsys.readouterr().out == "\x1b[2J"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    print_answer("\x1b[2J\n")
    assert terminal.getvalue() == "\\u001b[2J\n\n"


def test_pictures_show_dollars_and_markup_as_they_are(tmp_path: Path) -> None:
    figure = Figure()
    axes = figure.subplots()
    name = plain_label("out/$x_{$ costs $5 \\alpha 漢字" + CONTROLS)
    axes.set(title=name, xlabel=name)
    axes.set_yticks([0.5], [name])
    axes.plot([0, 1], label=name)
    figure.legend()
    with warnings.catch_warnings(action="error"):
        save_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_markdown_shows_text_as_it_is() -> None:
    assert escape_markdown("a|b\n# <script> [x](y) `c` *d*") == r"a\|b # \<script\> [x\](y) \`c\` \*d\*"
    assert escape_markdown(r"a\n b\|c") == r"a\n b\\\|c"
    assert escape_markdown("e_f: 50.0 [0.0, 100.0]") == "e_f: 50.0 [0.0, 100.0]"
    assert code_span("a`b``c") == "```a`b``c```"
    assert code_span("`a") == "`` `a ``"
    assert code_block("x: ```\n````\n", "yaml") == "`````yaml\nx: ```\n````\n`````"
    assert markdown_table(["a", "b"], [["x|y\n| z", 1]]) == "| a | b |\n| --- | --- |\n| x\\|y \\| z | 1 |"
