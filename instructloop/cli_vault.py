"""`instructloop vault`: the keys under which people's texts are in the log."""

import os

import typer

from instructloop.options import LOG, Log

app = typer.Typer(no_args_is_help=True, help="Keys of people's texts.")


@app.command("rotate")
def rotate(log: Log = LOG) -> None:
    """Let a new master key take over, while servers run.

    The old one is destroyed. With a master key from the environment: start everything with NEW,OLD,
    run this, then start with NEW alone.
    """
    from feedback.vault import master_file, open_vault, vault_path
    from feedback.vault.keys import rotate as run
    from feedback.vault.master import ENVIRONMENT, LocalMasterKeys

    vault = open_vault(log)
    if os.environ.get(ENVIRONMENT):
        done = vault.rewrap()
    else:
        done = run(vault, LocalMasterKeys.at(master_file(vault_path(log)), {}))
    typer.echo(f"{done} data keys wrapped by the new master key")
