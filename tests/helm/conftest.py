"""The chart, rendered by helm."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PARTS, CHART = ROOT / ".helm", ROOT / "helm"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
KUBERNETES = "1.34.4"
KINDS_OF_OTHERS = ("monitoring.coreos.com/v1", "gateway.networking.k8s.io/v1")

Rendered = list[dict[str, Any]]
Render = Callable[..., Rendered]


class Refused(Exception):
    """What helm said."""


@pytest.fixture(scope="session")
def helm() -> Callable[..., str]:
    """helm with these words; raises Refused."""
    if not (PARTS / "helm").exists():
        reason = "needs helm: make helmparts"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)

    def run(*words: str, values: str = "") -> str:
        done = subprocess.run(
            [PARTS / "helm", *words, "--kube-version", KUBERNETES],
            input=values,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Refused(done.stderr + done.stdout)
        return done.stdout

    return run


@pytest.fixture(scope="session")
def render(helm: Callable[..., str]) -> Render:
    """The objects that helm makes of an example, with `changes` on top of it."""

    def objects(example: str, apis: tuple[str, ...] = KINDS_OF_OTHERS, **changes: Any) -> Rendered:
        shown = [word for api in apis for word in ("--api-versions", api)]
        file = str(CHART / "examples" / f"{example}.yaml")
        words = ["template", "il", str(CHART), "--namespace", "here", *shown]
        text = helm(*words, "-f", file, "-f", "-", values=yaml.safe_dump(changes))
        return [found for found in yaml.safe_load_all(text) if found]

    return objects


def only(objects: Rendered, kind: str, name: str = "") -> dict[str, Any]:
    """The one object of a kind whose name ends so."""
    (found,) = [
        o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(name or "")
    ]
    return found


def pods(objects: Rendered) -> dict[str, dict[str, Any]]:
    """Component to its pod, with metadata and spec."""
    templates = {
        "StatefulSet": lambda o: o["spec"]["template"],
        "CronJob": lambda o: o["spec"]["jobTemplate"]["spec"]["template"],
        "Pod": lambda o: o,
    }
    found = [templates[o["kind"]](o) for o in objects if o["kind"] in templates]
    return {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for pod in found}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def environment(container: dict[str, Any]) -> dict[str, Any]:
    """Variable to its value, or to where that comes from."""
    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names)), names
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}
