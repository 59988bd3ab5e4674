"""A server's variables: one that nothing reads is refused, for it was meant to do something."""

import re
from collections.abc import Mapping
from difflib import get_close_matches

from contracts.errors import InvalidInput
from feedback.log.address import KafkaSettings
from feedback.log.spool import SpoolSettings
from serving.settings import Settings

PREFIX = "INSTRUCTLOOP_"
# Read by the command line, by the vault, and by those who test with real data.
OTHERS = ("LOG", "REGISTRY", "KEYS", "ADMIN_KEY", "VAULT", "MASTER_KEY", "MASTER_KEY_FILE", "DATA")
# What Kubernetes tells a pod of a service whose name begins like ours.
SERVICE_LINK = re.compile(
    r"(_SERVICE_(HOST|PORT)(_\w+)?|_PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)$", re.ASCII
)


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises InvalidInput for a variable of ours that does not exist. Its value is not repeated: it
    may be a secret.
    """
    known = {PREFIX + name for name in OTHERS}
    for kind in (Settings, KafkaSettings, SpoolSettings):
        known |= {kind.variable(field) for field in kind.model_fields}
    for name in sorted(environment):
        if not name.upper().startswith(PREFIX) or SERVICE_LINK.search(name):
            continue
        if name.upper() not in known:
            near = get_close_matches(name.upper(), known, 1)
            meant = f", such as {near[0]}" if near else ""
            raise InvalidInput(name, f"a variable that exists{meant}", "an unknown one")
