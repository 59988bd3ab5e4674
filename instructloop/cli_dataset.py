"""`instructloop dataset`: build, show, compare, explain and review what models learn from."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from instructloop.options import LOG, REGISTRY, Data, Log, Registry

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from feedback.dataset.engine import Engine, Reopen
    from feedback.dataset.review import Waiting

app = typer.Typer(no_args_is_help=True, help="Datasets: what a model learned from.")
Config = Annotated[Path | None, typer.Option(help="A round's TOML file, for its [rules].")]


@app.command("build")
def build(
    log: Log = LOG,
    registry: Registry = REGISTRY,
    config: Config = None,
    data: Data = None,
    like: Annotated[str | None, typer.Option(help="Dataset whose range of events to take.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of this machine.")] = 1,
    spark: Annotated[
        str | None, typer.Option(help="Spark master, as spark://HOST:7077, in their place.")
    ] = None,
) -> None:
    """Build the dataset of every event so far and print its digest."""
    from functools import partial

    from contracts.release import ReleaseRegistry
    from feedback.dataset.build import build_dataset
    from feedback.dataset.lineage import manifest_of
    from feedback.dataset.review import Reviews
    from feedback.dataset.segment import Outlines
    from feedback.dataset.settings import RuleSettings
    from feedback.vault import open_events
    from instructloop.version import code_version

    releases = ReleaseRegistry(registry)
    rules, until = RuleSettings(), None
    if config is not None:
        from instructloop.config import load_config

        rules = load_config(config, data).rules
    if like is not None:
        events = manifest_of(releases, like).events
        until = {t: {p: end for p, (_, end) in of.items()} for t, of in events.items()}
    with _engine(partial(open_events, log), processes, spark) as engine:
        digest = build_dataset(
            open_events(log),
            releases.artifacts,
            rules,
            code_version(),
            decisions=Reviews(releases).decisions(),
            until=until,
            engine=engine,
            outlines=Outlines.below(releases),
        )
    typer.echo(digest)


def _engine(
    reopen: "Reopen", processes: int, master: str | None
) -> "AbstractContextManager[Engine | None]":
    """None stands for this process alone."""
    from contextlib import nullcontext

    from contracts.errors import InvalidInput
    from feedback.dataset.engine import Processes

    if master is None:
        return nullcontext() if processes == 1 else Processes(reopen, processes)
    try:
        from feedback.dataset.spark import Spark
    except ImportError:
        raise InvalidInput("--spark", "PySpark installed: instructloop[spark]", master) from None
    return Spark(reopen, master)


@app.command("show")
def show(digest: str, registry: Registry = REGISTRY) -> None:
    """Print its manifest: event range, rules with counts, rows, people."""
    from contracts.release import ReleaseRegistry
    from feedback.dataset.lineage import manifest_of

    typer.echo(manifest_of(ReleaseRegistry(registry), digest).model_dump_json(indent=1))


@app.command("diff")
def diff(before: str, after: str, registry: Registry = REGISTRY) -> None:
    """Print what differs between the manifests of two datasets."""
    from contracts.release import ReleaseRegistry
    from feedback.dataset.lineage import diff as differences

    typer.echo(json.dumps(differences(ReleaseRegistry(registry), before, after), indent=1))


@app.command("explain")
def explain(id: str, registry: Registry = REGISTRY) -> None:
    """Print what an id became: rows and models.

    Of a completion or an event; of a release, the rows that it was made of.
    """
    from contracts.release import ReleaseRegistry
    from feedback.dataset.lineage import explain as run

    typer.echo(json.dumps(run(ReleaseRegistry(registry), id), indent=1, ensure_ascii=False))


@app.command("review")
def review(
    digest: str,
    reviewer: Annotated[str | None, typer.Option(help="Who decides; without, only list.")] = None,
    registry: Registry = REGISTRY,
) -> None:
    """Confirm, row by row, what was masked.

    Of a dataset built with rules.review. Rows that are dropped are not in the next one.
    """
    from contracts.release import ReleaseRegistry
    from feedback.dataset.review import Reviews
    from feedback.dataset.review import review as run

    reviews = Reviews(ReleaseRegistry(registry))
    waiting = reviews.waiting(digest)
    if reviewer is None:
        for row in waiting:
            typer.echo(f"{row.row} {row.set} {','.join(row.masked)}")
        typer.echo(f"{len(waiting)} rows wait for a decision")
        return
    done = run(reviews, waiting, _ask, reviewer, time.time)
    typer.echo(f"{done} decided, {len(waiting) - done} wait")


def _ask(row: "Waiting") -> bool | None:
    typer.echo(f"\n--- {row.row} ({row.set}; masked: {', '.join(row.masked) or 'nothing'})")
    typer.echo(row.prompt)
    for response in row.responses:
        typer.echo(f"> {response}")
    answer = typer.prompt("keep, drop or stop", type=str).strip().lower()
    return {"keep": True, "k": True, "drop": False, "d": False}.get(answer)
