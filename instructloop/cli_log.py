"""`instructloop log`: what the event log could not read, and its age."""

import time
from typing import Annotated

import typer

from instructloop.options import LOG, Log

app = typer.Typer(no_args_is_help=True, help="The event log: what it could not read, its age.")


@app.command("letters")
def letters(log: Log = LOG) -> None:
    """Print where the log holds what is no event of its topic, and why.

    What is in it is not printed.
    """
    from feedback.vault import open_events

    for letter in open_events(log).dead_letters():
        typer.echo(f"{letter.topic} {letter.partition} {letter.offset} {letter.reason}")


@app.command("revive")
def revive(log: Log = LOG) -> None:
    """Append again what this version can read by now.

    Exit 1 if something is left.
    """
    from feedback.vault import open_events

    events = open_events(log)
    found = events.dead_letters()
    left = [(letter, why) for letter in found if (why := events.revive(letter)) is not None]
    for letter, why in left:
        typer.echo(f"{letter.topic} {letter.partition} {letter.offset} {why}", err=True)
    typer.echo(f"{len(found) - len(left)} came back, {len(left)} stay")
    if left:
        raise typer.Exit(1)


@app.command("expire")
def expire(
    topic: str,
    days: Annotated[float, typer.Option(min=0, help="Age from which on events are dropped.")],
    log: Log = LOG,
) -> None:
    """Drop events of a topic that are older than that, for good."""
    from feedback.vault import open_events

    dropped = open_events(log).expire(topic, before=time.time() - days * 86400)
    typer.echo(f"{dropped} dropped from {topic}")
