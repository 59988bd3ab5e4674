"""Opens the log that a URL names."""

from pathlib import Path

from contracts.errors import InvalidInput
from contracts.log import Log
from feedback.log.embedded import EmbeddedLog

_SCHEME = "sqlite:///"


def open_log(url: str) -> Log:
    """The log at `url`: `sqlite:///relative/path` or `sqlite:////absolute/path`, created if absent.

    Raises InvalidInput.
    """
    path = url.removeprefix(_SCHEME)
    if path == url or not path or any(mark in path for mark in "?#"):
        raise InvalidInput("log URL", "sqlite:///PATH, without query or fragment", url)
    return EmbeddedLog(Path(path))
