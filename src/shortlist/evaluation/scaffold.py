"""The files of a new system: a model that works, its test, its claim and its page, to be filled with the paper's own words.

Into a clone they go where their kin stand; into a folder of one's own, a flat one that SHORTLIST_SYSTEMS can name:

    src/shortlist/models/ROOM/NAME.py      DIR/NAME.py
    tests/models/ROOM/test_NAME.py         DIR/test_NAME.py
    evidence/NAME_page.py                  DIR/evidence/NAME_page.py
    docs/systems/NAME.md                   DIR/docs/systems/NAME.md

The page is made of the model by the generator of all pages (`shortlist systems --pages`), and made again by it when the model has changed;
in a clone the list of systems in the docs gets its line too.
"""

from __future__ import annotations

import importlib.resources
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from shortlist.errors import ConfigError
from shortlist.registry import ENVIRONMENT, find, registered, systems

Kind = Literal["retriever", "ranker", "reranker"]
Room = Literal["retrieval", "ranking"]
ROOM_OF: Mapping[Kind, Room] = {"retriever": "retrieval", "ranker": "ranking", "reranker": "ranking"}
STAGE_OF: Mapping[Kind, str] = {"retriever": "retrieval", "ranker": "ranking", "reranker": "re-ranking"}
BESIDE: Mapping[Kind, str] = {"retriever": "popularity", "ranker": "dnn", "reranker": "mmr"}
"""What the claim sets it against."""
_BEFORE: Mapping[Kind, str] = {"reranker": '[stages.ranking]\nsystems = ["personal-frequency"]\nkeep = 50\n'}
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_OWN_FOLDER = f"""
# The system stands beside this file; pytest finds it wherever it is called from.
_named = [os.environ.get("{ENVIRONMENT}"), str(Path(__file__).parent)]
os.environ["{ENVIRONMENT}"] = os.pathsep.join(filter(None, _named))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaffold:
    """What is to be written, and where."""

    name: str
    kind: Kind
    folder: Path | None
    """A folder of one's own; None = the clone one stands in."""
    texts: Mapping[Path, str]
    """Model, test and claim, in this order."""
    docs: Path
    """Folder of the page."""

    @property
    def page(self) -> Path:
        """File of the page."""
        return self.docs / "systems" / f"{self.name}.md"

    @property
    def claim(self) -> Path:
        """File of the claim."""
        return list(self.texts)[2]


def plan(name: str, kind: Kind, *, room: Room | None = None, folder: Path | None = None) -> Scaffold:
    """The files of a new system; writes nothing.

    Args:
        name: as configs will say it: lower-case words with hyphens.
        kind: which contract it fulfils.
        room: folder of the model inside the clone; None = the kind's own.
        folder: write there and not into the clone one stands in.

    Raises:
        ConfigError: the name can not be used or is taken, a file is there already, or there is no clone here.
    """
    module, title = name.replace("-", "_"), "".join(part.capitalize() for part in name.split("-"))
    templates = _templates(kind)
    _check_name(name, module, title, templates)
    if folder is not None and room is not None:
        raise ConfigError("--room says where in a clone the model stands; leave it out with --dir")
    if folder is None and not Path("src/shortlist/models").is_dir():
        raise ConfigError(
            f"{Path.cwd()} is no clone of shortlist (it has no src/shortlist/models); stand in one, or give --dir"
        )
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give --dir a folder")
    claim = f"{module}_page"
    if folder is None:
        chosen = room or ROOM_OF[kind]
        model = Path("src/shortlist/models") / chosen / f"{module}.py"
        paths = [model, Path("tests/models") / chosen / f"test_{module}.py", Path("evidence") / f"{claim}.py"]
    else:
        paths = [folder / f"{module}.py", folder / f"test_{module}.py", folder / "evidence" / f"{claim}.py"]
    docs = Path("docs") if folder is None else folder / "docs"
    there = [path for path in (*paths, docs / "systems" / f"{name}.md") if path.exists()]
    if there:
        raise ConfigError(f"{there[0]} is there already and stays as it is; choose another name or move it away")
    words = {
        "name": name,
        "Class": title,
        "claim": claim,
        "stage": STAGE_OF[kind],
        "beside": BESIDE[kind],
        "before": _BEFORE.get(kind, ""),
        "imports": "" if folder is None else "import os\nfrom pathlib import Path\n\n",
        "setup": "" if folder is None else _OWN_FOLDER,
    }
    texts = (Template(template).substitute(words) for template in templates)
    return Scaffold(name=name, kind=kind, folder=folder, texts=dict(zip(paths, texts)), docs=docs)


def write(scaffold: Scaffold) -> list[Path]:
    """Write all files; FileExistsError, and nothing is overwritten, where one has come into being since `plan`."""
    for path, text in scaffold.texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(text)
    _write_page(scaffold)
    return [*scaffold.texts, scaffold.page]


def _write_page(scaffold: Scaffold) -> None:
    """The page of the model as it has just been written, and in a clone the list with it."""
    from shortlist.evaluation import pages

    model = next(iter(scaffold.texts))
    in_clone = scaffold.folder is None
    name = ".".join(model.with_suffix("").parts[1:]) if in_clone else f"shortlist_systems_{model.stem}"
    with registered(model, name):
        path, text = pages.page_alone(find(scaffold.name))
        index = scaffold.docs / "systems" / "index.md"
        if in_clone and index.exists():
            index.write_text(pages.systems_index(pages.own_systems()))
    scaffold.page.parent.mkdir(parents=True, exist_ok=True)
    with (scaffold.docs / path).open("x") as file:
        file.write(text)


def next_steps(scaffold: Scaffold) -> list[str]:
    """What to do now, as lines to be typed."""
    model, test, claim = scaffold.texts
    edit = f"edit {model}: source, equations, settings; it works as it stands"
    if scaffold.folder is None:
        words = " or ".join(dict.fromkeys([model.stem, scaffold.name]))
        return [
            edit,
            f'pytest {test} tests/contracts -k "{words}"',
            f"shortlist prove {claim.stem} --quick",
            f"shortlist systems --pages docs    when the model has changed, for {scaffold.page}",
            "shortlist systems --markdown    and put the table into README.md",
        ]
    return [
        f"export {ENVIRONMENT}={scaffold.folder.resolve()}",
        edit,
        f"pytest {test}",
        f"shortlist systems {scaffold.name}",
        f"shortlist systems {scaffold.name} --pages {scaffold.docs}    when the model has changed",
        f"shortlist prove {claim.stem} --quick --evidence {claim.parent}",
    ]


def _templates(kind: Kind) -> list[str]:
    """Texts of model, test and claim."""
    folder = importlib.resources.files("shortlist.evaluation") / "templates"
    claim = "claim_retriever" if kind == "retriever" else "claim_trained"
    return [(folder / f"{name}.py.txt").read_text() for name in (kind, f"test_{kind}", claim)]


def _check_name(name: str, module: str, title: str, templates: list[str]) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} can not be a system's name: use lower-case words with hyphens, such as item-knn, the first one beginning "
            "with a letter"
        )
    if keyword.iskeyword(module) or name.startswith("test-") or name == "test":
        raise ConfigError(
            f"{name!r} can not be a system's name: its file {module}.py could not be imported; choose another"
        )
    for entry in systems():
        if entry.name.replace("-", "_") == module:
            raise ConfigError(f"there is a system {entry.name!r} already ({entry.cls.__module__}); choose another name")
    for word in (title, f"{title}Config"):
        if any(re.search(rf"\b{word}\b", template) for template in templates):
            raise ConfigError(
                f"{name!r} can not be a system's name: the class {word} means something else; choose another"
            )
