"""The READMEs of the project and the code blocks in them, for the tests that run or check these blocks."""

import json
import re
import shlex
import shutil
from pathlib import Path

import yaml

from blockft.config.settings import PromptSettings

ROOT = Path(__file__).parents[1]
MAIN = ROOT / "README.md"
DEMO_MODEL = ROOT / "data" / "demo" / "model"
HIDDEN_FOLDERS = ("out", "node_modules")

READMES = sorted(
    path
    for path in ROOT.rglob("README.md")
    if not any(part.startswith(".") or part in HIDDEN_FOLDERS for part in path.relative_to(ROOT).parts)
)
"""Every README of the project."""


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code_blocks(path: Path, language: str) -> list[str]:
    """Return the contents of the fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(path), flags=re.MULTILINE | re.DOTALL)


def shell_commands(path: Path) -> list[list[str]]:
    """Return every command of the shell blocks, without comments and with continued lines joined."""
    text = "\n".join(code_blocks(path, "sh")).replace("\\\n", " ")
    commands = (shlex.split(line, comments=True) for line in text.splitlines())
    return [command for command in commands if command]


def prose_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines outside of code blocks with their numbers, counted from 1."""
    lines, in_code = [], False
    for number, line in enumerate(read(path).splitlines(), start=1):
        if line.startswith("```"):
            in_code = not in_code
        elif not in_code:
            lines.append((number, line))
    return lines


def anchors(path: Path) -> set[str]:
    """Return the anchors that a page with these headings has on GitHub."""
    titles = (line.lstrip("#").strip() for _, line in prose_lines(path) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(path: Path) -> list[str]:
    """Return the targets of all links, inline and by reference."""
    text = "\n".join(line for _, line in prose_lines(path))
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    return inline + re.findall(r"^\[[^\]]+\]: (\S+)", text, flags=re.MULTILINE)


def inline_code(path: Path) -> list[str]:
    """Return the texts in single backquotes, outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", "\n".join(line for _, line in prose_lines(path)))


def save_export(folder: Path) -> Path:
    """Copy the demo's model, which saw no question over documents, as an export with the default wording."""
    shutil.copytree(DEMO_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    wording = PromptSettings()
    config["block_attention"] |= {
        "documents_in": wording.documents_in,
        "order": "ascending",
        "prompt": {name: getattr(wording, name) for name in ("instruction", "document", "question")},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_own_data(folder: Path) -> None:
    """Write what a reader of the main README writes: `mine.yaml`, and files with its example records.

    The recipe is the README's, with the demo's model in place of a model on the Hub.
    """
    recipe = yaml.safe_load(code_blocks(MAIN, "yaml")[0])
    recipe["model"]["path"] = str(DEMO_MODEL)
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    question, chat, request = (block.strip() for block in code_blocks(MAIN, "json"))
    records = {"questions": question, "heldout": question, "chats": chat, "requests": request}
    records["corpus"] = json.dumps({"title": "Oslo", "text": "In Norway."})
    for name, record in records.items():
        (folder / f"{name}.jsonl").write_text(f"{record}\n")
