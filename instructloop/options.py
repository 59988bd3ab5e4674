"""Options that several commands have, with their variables and defaults."""

from pathlib import Path
from typing import Annotated

import typer

Log = Annotated[str, typer.Option(envvar="INSTRUCTLOOP_LOG", help="Where events are.")]
Registry = Annotated[Path, typer.Option(envvar="INSTRUCTLOOP_REGISTRY", help="Folder of releases.")]
Keys = Annotated[Path, typer.Option(envvar="INSTRUCTLOOP_KEYS", help="File of API keys.")]
Data = Annotated[Path | None, typer.Option(envvar="INSTRUCTLOOP_DATA", help="Data folder.")]
User = Annotated[str, typer.Option(help="Whose data.")]

LOG = "sqlite:///instructloop-data/log.db"
REGISTRY, KEYS = Path("instructloop-data/registry"), Path("instructloop-data/keys.db")
