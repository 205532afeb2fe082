"""What the site adds when it is built: every system's page in the menu, and the recorded results on it (see mkdocs.yml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_config(config: Any) -> Any:
    """Put the systems' pages under Systems, so that a new system needs no line in mkdocs.yml."""
    pages = sorted(path.name for path in (ROOT / "docs" / "systems").glob("*.md") if path.name != "index.md")
    for entry in config.nav:
        if "Systems" in entry:
            entry["Systems"] = [{"All": "systems/index.md"}, *({Path(name).stem: f"systems/{name}"} for name in pages)]
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the recorded results of a system where its page wants them."""
    from shortlist.evaluation.pages import NUMBERS, numbers

    if NUMBERS not in markdown:
        return markdown
    return markdown.replace(NUMBERS, numbers(Path(page.file.src_uri).stem, ROOT / "evidence"))
