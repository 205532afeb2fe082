"""`shortlist keys`: who may ask a server, and for what."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from shortlist.cli._options import Json


class Action(StrEnum):
    """What to do with the file of keys."""

    ADD = "add"
    LIST = "list"
    REVOKE = "revoke"


class Role(StrEnum):
    """What a key is for; each includes those before it."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


def command(
    action: Annotated[Action, typer.Argument(help="add, list or revoke.")],
    name: Annotated[str | None, typer.Argument(help="Who has the key; revoke takes the key's id too.")] = None,
    file: Annotated[Path, typer.Option(help="File of keys, made by the first add.")] = Path("keys.json"),
    role: Annotated[
        Role, typer.Option(help="read: pages; write: also events, items, users and campaigns; admin: all.")
    ] = Role.READ,
    json_: Json = False,
) -> None:
    """Make, list or revoke API keys. A key is shown once, when it is made; the file keeps only a salted hash of it.

    Example: shortlist keys add shop --role read --file keys.json
    """
    import json

    from shortlist.errors import ConfigError
    from shortlist.serving.keys import add_key, read_keys, revoke_key

    if action is Action.LIST:
        keys = [
            {"id": key.id, "name": key.name, "role": key.role, "made_at": key.made_at}
            for key in read_keys(file).values()
        ]
        lines = [f"{key['id']}  {key['role']:5}  {key['made_at']}  {key['name']}" for key in keys]
        typer.echo(json.dumps(keys, indent=1) if json_ else "\n".join(lines or ["no keys"]))
        return
    if name is None:
        raise ConfigError(f"say whose key: shortlist keys {action} NAME --file {file}")
    if action is Action.REVOKE:
        gone = revoke_key(file, name)
        told = {"id": gone.id, "name": gone.name, "role": gone.role}
        typer.echo(json.dumps(told) if json_ else f"revoked {gone.name} ({gone.id}); servers refuse it within a second")
        return
    key, secret = add_key(file, name, role.value)
    if json_:
        typer.echo(json.dumps({"id": key.id, "name": key.name, "role": key.role, "key": secret}))
        return
    typer.echo(secret)
    typer.echo(
        f"the {key.role} key of {key.name}; it is not shown again: keep it where only they can read it", err=True
    )
