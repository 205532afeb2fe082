"""Every snippet of the docs runs: python and toml blocks, and the lines of bash blocks that begin with `shortlist` or `curl`.

A page runs in a folder with the files of docs_support.py, block by block, all its python in one namespace. A toml block with a title is
written to the file of that name. `shortlist` lines run in this process; the same training is done once, for all pages,
with --quiet and --no-report. `shortlist serve` and `console` are
parsed, and what is asked of it by `curl` is asked of the same application without a port.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient

import shortlist as package
from cli_support import succeeds
from docs_support import write
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.cascade.experiments import read_experiments
from shortlist.cli import COMMANDS, build
from shortlist.errors import ConfigError
from shortlist.evaluation.runs import is_run
from shortlist.serving.app import create_app
from shortlist.store.published import served_run

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "start.md", *sorted(DOCS.glob("guides/*.md")), *sorted(DOCS.glob("migration/*.md"))]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOP = "shortlist train clicks.csv --items products.csv --out runs/shop"
"""The training that most pages look at."""


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in ((m[1], m[2], m[3]) for m in FENCE.finditer(page.read_text()))]


def lines(block: Block) -> Iterator[list[str]]:
    """Words of each command of a bash block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith(("shortlist ", "curl ")):
            yield shlex.split(line)


@dataclass
class Reader:
    """Somebody who follows a page."""

    trained: set[str]
    served: str = "runs/shop"

    def follow(self, page: Path) -> int:
        """Run a page's snippets; how many there were."""
        names: dict[str, object] = {}
        done = 0
        for block in blocks(page):
            done += 1
            match block.language:
                case "python":
                    exec(compile(block.text, f"{page.name}, block {done}", "exec"), names)
                case "toml":
                    (read_experiments if "[experiments." in block.text else RunConfig.from_toml)(block.text)
                    if block.title:
                        Path(block.title).write_text(block.text)
                case "bash":
                    for words in lines(block):
                        self.ask(words) if words[0] == "curl" else self.call(words)
                case _:
                    done -= 1
        return done

    def call(self, words: list[str]) -> None:
        if words[1] == "console":
            parse(words[1:])
            return
        if words[1] == "serve":
            parsed = parse(words[1:])
            self.served = str(served_run(Path(str(parsed["run"]))))
            assert is_run(Path(self.served))
            return
        line = shlex.join(words)
        trains = words[1] == "train" and "--print-config" not in words
        if not (trains and line in self.trained):
            succeeds(*words[1:], *(["--quiet", "--no-report"] if trains else []))
        if trains:
            self.trained.add(line)

    def ask(self, words: list[str]) -> None:
        """A curl line, asked of the application."""
        address = next(urlsplit(f"//{w}") for w in words if w.startswith("localhost:"))
        method = words[words.index("-X") + 1] if "-X" in words else "GET"
        headers = dict([words[words.index("-H") + 1].split(": ")]) if "-H" in words else {}
        body = words[words.index("-d") + 1] if "-d" in words else None
        target = f"{address.path}?{address.query}"
        with Engine.load(self.served, events="served.events.db") as engine, TestClient(create_app(engine)) as client:
            answer = client.request(method, target, headers=headers, content=body)
        assert answer.status_code == 200, (words, answer.text)
        assert answer.text


def parse(words: list[str]) -> dict[str, object]:
    """Options of a command, read as the command line reads them, without running it."""
    import typer

    command = typer.main.get_command(build(words[0])).commands[words[0]]  # type: ignore[attr-defined]
    return dict(command.make_context(words[0], list(words[1:])).params)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with the files that pages read and the run that most look at."""
    folder = tmp_path_factory.mktemp("docs")
    write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        reader = Reader(trained=set())
        reader.call(shlex.split(SHOP))
        yield reader


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page, shop):
    assert shop.follow(page) >= 2, f"{page} shows nothing to run"


def test_the_reader_fails_where_a_page_is_wrong(shop, tmp_path):
    """What is written wrong is found: an unknown setting, a wrong option, an assertion, a path the server does not have."""
    wrong = (
        ("toml", "[surface]\nsize = 3\n", ConfigError),
        ("bash", "shortlist evaluate runs/shop --page-length 3\n", AssertionError),
        ("python", "assert 1 == 2\n", AssertionError),
    )
    for language, text, error in wrong:
        page = tmp_path / f"{language}.md"
        page.write_text(f"```{language}\n{text}```\n")
        with pytest.raises(error):
            shop.follow(page)
    with pytest.raises(AssertionError):
        shop.ask(["curl", "-s", "localhost:8000/v2/recommend/u17"])


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: str(p.relative_to(DOCS)))
def test_links_lead_to_pages(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+?)(?:#[^)]*)?\)", text):
        # The page of all results is written by `shortlist prove --page`; tests/test_docs.py asks for it.
        if "://" not in target and Path(target).name != "evidence.md":
            assert (page.parent / target).exists(), f"{page.relative_to(DOCS)} links to {target}"


def test_named_commands_and_functions_exist():
    for page in [DOCS / "index.md", *PAGES]:
        for name in re.findall(r"`shortlist ([a-z-]+)", page.read_text()):
            assert name in COMMANDS, f"{page.name}: shortlist {name}"
        for name in re.findall(r"\bshortlist\.([a-z]+)\(", page.read_text()):
            assert hasattr(package, name), f"{page.name}: shortlist.{name}"


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in [DOCS / "index.md", *PAGES, *sorted(DOCS.glob("reference/*.md"))]:
        assert str(page.relative_to(DOCS)) in menu
