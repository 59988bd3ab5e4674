"""The command line: a command imports its package only when it runs."""

import json
import signal
from pathlib import Path
from typing import Annotated, cast

import typer

from contracts.access import Scope
from contracts.errors import InstructloopError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
keys = typer.Typer(no_args_is_help=True, help="API keys: who may ask.")
consent = typer.Typer(no_args_is_help=True, help="Who agreed that their data is used.")
dataset = typer.Typer(no_args_is_help=True, help="Datasets: what a model learned from.")
release = typer.Typer(no_args_is_help=True, help="Releases: what is served, and what was before.")
app.add_typer(keys, name="keys")
app.add_typer(consent, name="consent")
app.add_typer(dataset, name="dataset")
app.add_typer(release, name="release")

Log = Annotated[str, typer.Option(envvar="INSTRUCTLOOP_LOG", help="Where events are.")]
Registry = Annotated[Path, typer.Option(envvar="INSTRUCTLOOP_REGISTRY", help="Folder of releases.")]
Keys = Annotated[Path, typer.Option(envvar="INSTRUCTLOOP_KEYS", help="File of API keys.")]
Data = Annotated[Path | None, typer.Option(envvar="INSTRUCTLOOP_DATA", help="Data folder.")]

PerMinute = Annotated[
    int | None, typer.Option(min=0, help="The key's own limit; 0: none. Default: the server's.")
]

LOG = "sqlite:///instructloop-data/log.db"
REGISTRY, KEYS = Path("instructloop-data/registry"), Path("instructloop-data/keys.db")


@app.command()
def serve(
    model: Annotated[Path | None, typer.Option(help="Model folder to release first.")] = None,
    name: Annotated[str, typer.Option(help="Name of that model in requests.")] = "instructloop",
    host: str = "127.0.0.1",
    port: int = 8000,
    log: Log = LOG,
    registry: Registry = REGISTRY,
    keys: Keys = KEYS,
) -> None:
    """Serve the current release, the feedback API and the Playground."""
    from contracts.release import ReleaseRegistry
    from instructloop.serve import Place, bring_model, key_for_newcomer
    from instructloop.serve import serve as run
    from instructloop.version import code_version
    from serving.settings import Settings

    place = Place(log=log, registry=registry, keys=keys)
    releases = ReleaseRegistry(registry)
    if model is not None:
        bring_model(releases, model, name, code_version())
    if releases.current_id() is None:
        typer.echo(
            "nothing is released yet; waiting for the first release (or give --model FOLDER)",
            err=True,
        )
    if not keys.exists():
        typer.echo(f"Playground: http://{host}:{port}/#key={key_for_newcomer(place)}")
    run(place, Settings(), host, port)


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
    """Print every key's id, state, owner, project and scopes."""
    from serving.access import KeyStore

    for info in KeyStore(keys).list():
        who = info.principal
        state = "active" if info.revoked is None else "revoked"
        production = " production" if who.production else ""
        typer.echo(
            f"{who.key_id} {state} {who.user_id} {who.project} "
            f"{','.join(sorted(who.scopes))}{production}"
        )


@keys.command("revoke")
def revoke_key(key_id: str, keys: Keys = KEYS) -> None:
    """Make a key worthless at once."""
    from serving.access import KeyStore

    KeyStore(keys).revoke(key_id)


@consent.command("show")
def show_consent(user: Annotated[str, typer.Option()], log: Log = LOG) -> None:
    """Print the notice version that the person agreed to, or none."""
    from feedback.consent import ConsentLedger
    from feedback.log import open_log

    typer.echo(ConsentLedger(open_log(log)).granted_notice(user) or "none")


@consent.command("withdraw")
def withdraw_consent(user: Annotated[str, typer.Option()], log: Log = LOG) -> None:
    """Take back the person's agreement: nothing of theirs is in the next dataset."""
    from contracts.events import Stamper
    from contracts.v1 import events_pb2 as pb
    from feedback import notice
    from feedback.log import open_log

    body = pb.Consent(state=pb.CONSENT_STATE_WITHDRAWN, notice_version=notice.CURRENT.version)
    open_log(log).append([Stamper("cli").event(user, body)])


@app.command("import")
def import_(
    format: Annotated[str, typer.Argument(help="e2e, rankme, hh, oasst or alpaca")],
    path: Path,
    log: Log = LOG,
) -> None:
    """Read a public file of demonstrations or rankings into the log."""
    from feedback.importers import import_file
    from feedback.log import open_log

    report = import_file(format, path, open_log(log))
    for bad in report.malformed:
        typer.echo(str(bad), err=True)
    typer.echo(
        f"{report.rows} rows imported as {report.events} events, {len(report.malformed)} malformed"
    )


@dataset.command("build")
def build(log: Log = LOG, registry: Registry = REGISTRY) -> None:
    """Build the dataset of every event so far and print its digest."""
    from contracts.release import ReleaseRegistry
    from feedback.dataset.build import build_dataset
    from feedback.dataset.rules import RuleSettings
    from feedback.log import open_log
    from instructloop.version import code_version

    typer.echo(
        build_dataset(
            open_log(log), ReleaseRegistry(registry).artifacts, RuleSettings(), code_version()
        )
    )


@dataset.command("show")
def show(digest: str, registry: Registry = REGISTRY) -> None:
    """Print a dataset's manifest: event range, rules with counts, rows, people."""
    from contracts.dataset import MANIFEST
    from contracts.release import ReleaseRegistry

    folder = ReleaseRegistry(registry).artifacts.path(digest)
    typer.echo((folder / MANIFEST).read_text(encoding="utf-8"))


@release.command("list")
def list_releases(registry: Registry = REGISTRY) -> None:
    """Print the releases in the order in which they became current, as JSON lines."""
    from contracts.release import ReleaseRegistry

    releases = ReleaseRegistry(registry)
    for release_id in releases.history():
        row = releases.get(release_id)
        typer.echo(json.dumps(row.model_dump(mode="json", exclude={"canary"})))


@release.command("rollback")
def rollback(registry: Registry = REGISTRY) -> None:
    """Make the current release's parent current again; running servers follow."""
    from contracts.release import ReleaseRegistry

    typer.echo(ReleaseRegistry(registry).rollback().id)


@app.command()
def loop(
    config: Annotated[Path, typer.Option(help="The round's TOML file.")],
    data: Data = None,
) -> None:
    """Run one round: dataset, reward model, policy, evaluation, gate, release."""
    from instructloop.config import load_config
    from instructloop.round import run_round

    run_round(load_config(config, data), typer.echo)


def main() -> None:
    """Entry point: an error that we raised on purpose is one line, not a traceback."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        app()
    except InstructloopError as e:
        typer.echo(f"instructloop: {e}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
