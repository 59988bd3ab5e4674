"""`instructloop consent`: what a person agreed to, takes back, wants to know and to have."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from instructloop.options import KEYS, LOG, REGISTRY, Keys, Log, Registry, User

if TYPE_CHECKING:
    from feedback.rights import Rights

app = typer.Typer(no_args_is_help=True, help="Who agreed to what, and what was made of it.")
Purposes = Annotated[
    list[str] | None, typer.Option("--purpose", help="training, evaluation, reading; all if absent")
]


@app.command("show")
def show(user: User, log: Log = LOG) -> None:
    """Print what the person agreed to, by purpose.

    With the version of the notice that they saw, or none.
    """
    from feedback.consent import PURPOSES, ConsentLedger
    from feedback.vault import open_events

    state = ConsentLedger(open_events(log)).state(user)
    granted = {name: getattr(state, name).granted for name in PURPOSES}
    lines = [f"{name}: notice {version}" for name, version in granted.items() if version]
    typer.echo("\n".join(lines) or "none")


@app.command("grant")
def grant(
    user: User,
    notice: Annotated[str, typer.Option(help="Version of the notice that the person saw.")],
    purpose: Purposes = None,
    log: Log = LOG,
) -> None:
    """Record that the person agreed, for example on paper."""
    from contracts.errors import InvalidInput
    from feedback.notice import CURRENT

    if notice != CURRENT.version:
        raise InvalidInput("notice", f"the current version, {CURRENT.version}", notice)
    _rights(log, None).grant(user, notice, purpose or ())


@app.command("withdraw")
def withdraw(
    user: User,
    purpose: Purposes = None,
    erase: Annotated[bool, typer.Option(help="Delete the key of all that they wrote.")] = False,
    log: Log = LOG,
    registry: Registry = REGISTRY,
) -> None:
    """Take back the person's agreement.

    Prints what was made of their data until now. Nothing of theirs is in the next dataset.
    """
    typer.echo(_json(_rights(log, registry).withdraw(user, purpose or (), erase=erase)))


@app.command("report")
def report(user: User, log: Log = LOG, registry: Registry = REGISTRY) -> None:
    """Print the datasets, models and releases made of the person's data."""
    typer.echo(_json(_rights(log, registry).report(user)))


@app.command("export")
def export(
    user: User,
    out: Annotated[Path | None, typer.Option(help="File to write; else printed.")] = None,
    log: Log = LOG,
    registry: Registry = REGISTRY,
    keys: Keys = KEYS,
) -> None:
    """All that is held about the person, as one JSON file."""
    from contracts.artifact import write_text_durably
    from serving.access import KeyStore
    from serving.keys import described

    held = _rights(log, registry).export(user)
    infos = KeyStore(keys).list() if keys.exists() else []
    held["api_keys"] = [described(i) for i in infos if i.principal.user_id == user]
    if out is None:
        typer.echo(_json(held))
    else:
        write_text_durably(out, _json(held))


def _rights(log: str, registry: Path | None) -> "Rights":
    from contracts.events import Stamper
    from contracts.release import ReleaseRegistry
    from feedback.rights import Rights
    from feedback.vault import open_events

    events = open_events(log)
    releases = None if registry is None else ReleaseRegistry(registry)
    return Rights(events, events, releases, Stamper("cli"))


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
