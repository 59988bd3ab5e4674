"""Which code this is: the commit, marked where the working tree differs from it; the package
version without git.
"""

import hashlib
import importlib.metadata
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def code_version() -> str:
    """For example 1f2e3d4c5b6a or 1f2e3d4c5b6a+9a8b7c (a digest of what is not committed)."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return importlib.metadata.version("instructloop")
    changed = _git("diff", "HEAD") or ""
    return head + (f"+{hashlib.sha256(changed.encode()).hexdigest()[:6]}" if changed else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
