"""The command line: a command imports its package only when it runs."""

import json
import os
import signal
from pathlib import Path
from typing import Annotated, cast

import typer

from contracts.access import Scope
from contracts.errors import InstructloopError, InvalidInput
from instructloop import cli_consent, cli_dataset, cli_log, cli_vault
from instructloop.options import KEYS, LOG, REGISTRY, Data, Keys, Log, Registry

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it cuts long options short, and takes [rules] for a colour
    help="Serve a model, keep what people rank, train on it, release what came of it.",
)
keys = typer.Typer(no_args_is_help=True, help="API keys: who may ask.")
release = typer.Typer(no_args_is_help=True, help="Releases: what is served, and what was before.")
app.add_typer(keys, name="keys")
app.add_typer(cli_consent.app, name="consent")
app.add_typer(cli_dataset.app, name="dataset")
app.add_typer(cli_log.app, name="log")
app.add_typer(cli_vault.app, name="vault")
app.add_typer(release, name="release")

LOOPBACK = ("127.0.0.1", "::1", "localhost")

PerMinute = Annotated[
    int | None, typer.Option(min=0, help="The key's own limit; 0: none. Default: the server's.")
]


@app.command()
def serve(
    model: Annotated[Path | None, typer.Option(help="Model folder to release first.")] = None,
    name: Annotated[str, typer.Option(help="Name of that model in requests.")] = "instructloop",
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    log: Log = LOG,
    registry: Registry = REGISTRY,
    keys: Keys = KEYS,
) -> None:
    """Serve the current release, the feedback API and the Playground."""
    from contracts.release import ReleaseRegistry
    from instructloop.environment import check_environment
    from instructloop.serve import Place, bring_model, key_for_newcomer
    from instructloop.serve import serve as run
    from instructloop.version import code_version
    from serving.settings import Settings

    check_environment(os.environ)
    settings = Settings()
    place = Place(log=log, registry=registry, keys=keys)
    releases = ReleaseRegistry(registry)

    def prepare() -> None:
        if model is not None:
            bring_model(releases, model, name, code_version())
        if releases.current_id() is None:
            typer.echo(
                "nothing is released yet; waiting for the first release (or give --model FOLDER)",
                err=True,
            )
        # Elsewhere who reads what a server prints is not who sits before it.
        if host in LOOPBACK and (key := key_for_newcomer(place)) is not None:
            typer.echo(f"Playground: http://{host}:{port}/#key={key}")

    run(place, settings, host, port, prepare=prepare)


@keys.command("create")
def create_key(
    user: Annotated[str, typer.Option(help="Whose key it is.")],
    production: Annotated[bool, typer.Option(help="Never keep what comes with it.")] = False,
    scope: Annotated[
        list[str], typer.Option(help="What it opens: complete, feedback, label, metrics, admin.")
    ] = ["complete", "feedback"],  # noqa: B006  never changed
    project: Annotated[str, typer.Option(help="The project that its use belongs to.")] = "default",
    requests_per_minute: PerMinute = None,
    tokens_per_minute: PerMinute = None,
    keys: Keys = KEYS,
) -> None:
    """Make a key and print it, once."""
    from serving.access import KeyStore

    key, key_id = KeyStore(keys).create(
        user,
        production,
        cast("list[Scope]", scope),  # the store checks
        project,
        requests_per_minute,
        tokens_per_minute,
    )
    typer.echo(f"{key_id} {key}")


@keys.command("list")
def list_keys(keys: Keys = KEYS) -> None:
    """Print every key: id, state, owner, project, scopes, own limits."""
    from serving.access import KeyStore

    for info in KeyStore(keys).list():
        who = info.principal
        words = [
            who.key_id,
            "active" if info.revoked is None else "revoked",
            who.user_id,
            who.project,
            ",".join(sorted(who.scopes)),
        ]
        words += ["production"] if who.production else []
        own = {"requests": who.requests_per_minute, "tokens": who.tokens_per_minute}
        words += [f"{kind}={limit}/min" for kind, limit in own.items() if limit is not None]
        typer.echo(" ".join(words))


@keys.command("revoke")
def revoke_key(key_id: str, keys: Keys = KEYS) -> None:
    """Make a key worthless at once."""
    from serving.access import KeyStore

    KeyStore(keys).revoke(key_id)


@app.command()
def doctor(log: Log = LOG) -> None:
    """Say what is wrong with the event log, step by step.

    Exit 1 if something is.
    """
    from feedback.log.address import KafkaSettings
    from feedback.log.doctor import examine
    from feedback.log.spool import SpoolSettings
    from instructloop.environment import check_environment

    check_environment(os.environ)
    well = True
    for finding in examine(log, KafkaSettings(), SpoolSettings()):
        typer.echo(f"{'ok    ' if finding.ok else 'FAILED'} {finding.what}: {finding.detail}")
        well = well and finding.ok
    if not well:
        raise typer.Exit(1)


@app.command("import")
def import_(
    format: Annotated[str, typer.Argument(help="e2e, rankme, hh, oasst or alpaca")],
    path: Path,
    log: Log = LOG,
) -> None:
    """Read a public file of demonstrations or rankings into the log."""
    from feedback.importers import import_file
    from feedback.vault import open_events

    report = import_file(format, path, open_events(log))
    for bad in report.malformed:
        typer.echo(str(bad), err=True)
    typer.echo(
        f"{report.rows} rows read as {report.events} events, of which none is in the log twice; "
        f"{len(report.malformed)} malformed"
    )


@release.command("list")
def list_releases(registry: Registry = REGISTRY) -> None:
    """Print as JSON lines the releases, as they became current."""
    from contracts.release import ReleaseRegistry

    releases = ReleaseRegistry(registry)
    for release_id in releases.history():
        row = releases.get(release_id)
        typer.echo(json.dumps(row.model_dump(mode="json", exclude={"canary"})))


@release.command("status")
def show_status(registry: Registry = REGISTRY) -> None:
    """Print what should be served and what each replica serves.

    Exit 1 while they differ, or while no replica serves anything.
    """
    import datetime as dt

    from contracts.release import ReleaseRegistry

    releases, now = ReleaseRegistry(registry), dt.datetime.now(dt.UTC)
    target, pinned = releases.target_id(), releases.pinned_id()
    typer.echo(f"target {target or 'none'}{' (pinned)' if pinned else ''}")
    behind, serving = False, 0
    for replica in releases.rollout.replicas(now):
        lost = replica.is_lost(now)
        behind |= not lost and replica.serving != target
        serving += not lost and replica.serving is not None
        state = f"lost since {replica.at:%H:%M:%S}" if lost else replica.state
        line = [replica.name, replica.serving or "none", state, f"{replica.running} running"]
        line += ["draining"] * replica.draining
        typer.echo("  ".join([*line, *filter(None, [replica.reason])]))
    if behind or not serving:
        raise typer.Exit(1)


@release.command("swap")
def swap(release_id: str, registry: Registry = REGISTRY) -> None:
    """Make a known release current; running servers follow."""
    from contracts.release import ReleaseRegistry

    typer.echo(ReleaseRegistry(registry).swap_to(release_id).id)


@release.command("pin")
def pin(
    release_id: Annotated[
        str | None, typer.Argument(help="The one that should be served now, if not given.")
    ] = None,
    registry: Registry = REGISTRY,
) -> None:
    """Keep servers on a release, whatever is published."""
    from contracts.release import ReleaseRegistry

    typer.echo(ReleaseRegistry(registry).pin(release_id).id)


@release.command("unpin")
def unpin(registry: Registry = REGISTRY) -> None:
    """Let servers follow what is published again."""
    from contracts.release import ReleaseRegistry

    typer.echo(ReleaseRegistry(registry).unpin() or "none")


@release.command("rollback")
def rollback(registry: Registry = REGISTRY) -> None:
    """Send servers back to the parent of what they should serve now."""
    from contracts.release import ReleaseRegistry

    typer.echo(ReleaseRegistry(registry).rollback().id)


@release.command("adapter")
def adapter(
    folder: Annotated[Path, typer.Argument(help="A LoRA adapter in peft's format.")],
    base: Annotated[str, typer.Option(help="The release whose weights it adapts.")],
    registry: Registry = REGISTRY,
) -> None:
    """Publish a LoRA adapter from a folder; running servers follow."""
    from contracts.release import ReleaseRegistry
    from instructloop.adapter import bring_adapter
    from instructloop.version import code_version

    typer.echo(bring_adapter(ReleaseRegistry(registry), folder, base, code_version()).id)


@release.command("push")
def push(
    release_id: Annotated[str, typer.Argument(help="A release of the registry on this machine.")],
    to: Annotated[list[str], typer.Option(help="Address of a server; again for each replica.")],
    key: Annotated[str, typer.Option(envvar="INSTRUCTLOOP_ADMIN_KEY", help="Of scope admin.")],
    registry: Registry = REGISTRY,
) -> None:
    """Hand a release to servers over the network; they swap to it."""
    from contracts.release import ReleaseRegistry
    from instructloop.push import push as hand_over

    hand_over(ReleaseRegistry(registry), release_id, to, key)
    typer.echo(release_id)


@release.command("share")
def share(
    part: Annotated[
        str | None, typer.Argument(help="r0003-1a2b3c4d=0.1; 0 for none. Without it: as they are.")
    ] = None,
    registry: Registry = REGISTRY,
) -> None:
    """Let another release answer a part of the people."""
    from contracts.release import ReleaseRegistry

    releases = ReleaseRegistry(registry)
    shares = releases.shares() if part is None else releases.share(*_share(part))
    for release_id, taken in shares.parts.items():
        typer.echo(f"{release_id} {taken:g}")


def _share(part: str) -> tuple[str, float]:
    release_id, _, share = part.partition("=")
    try:
        return release_id, float(share)
    except ValueError:
        raise InvalidInput("share", "RELEASE=PART, such as r0003-1a2b3c4d=0.1", part) from None


@app.command()
def loop(
    config: Annotated[Path, typer.Option(help="The round's TOML file.")],
    data: Data = None,
) -> None:
    """Run one round, from what people said to a release.

    Its steps are dataset, reward model, policy, evaluation, gate, release. Started by torchrun, its
    training is on all ranks.
    """
    from instructloop.config import load_config
    from instructloop.crew import lead
    from instructloop.round import run_round

    lead(lambda together: run_round(load_config(config, data), typer.echo, together))


def main() -> None:
    """Entry point: an error that we raised on purpose is one line, not a traceback."""
    # Not SIGINT's own handler: a shell that starts this with & has it ignored.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except InstructloopError as e:
        typer.echo(f"instructloop: {e}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
