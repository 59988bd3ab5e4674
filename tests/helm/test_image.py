"""The Dockerfile agrees with the chart, the Makefile and the packages."""

import re
import tomllib

import pytest

from tests.helm.conftest import ROOT, Render, pods

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_user_of_the_image_is_the_charts(render: Render) -> None:
    (user,) = re.findall(r"^USER (\d+):\1$", DOCKERFILE, re.MULTILINE)
    assert f"--uid {user} " in DOCKERFILE
    assert {
        pod["spec"]["securityContext"]["runAsUser"] for pod in pods(render("round")).values()
    } == {int(user)}


def test_uv_is_the_makefiles() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"uv==([\d.]+)", DOCKERFILE) == re.findall(
        r"^UV_VERSION := (.*)$", makefile, re.MULTILINE
    )


def test_what_is_installed_is_locked() -> None:
    for line in re.findall(r"uv pip install .*", DOCKERFILE):
        assert "requirements.lock" in line


def test_every_package_is_in_the_build_and_nothing_that_was_made_beside_it() -> None:
    with (ROOT / "pyproject.toml").open("rb") as f:
        packages = tomllib.load(f)["tool"]["hatch"]["build"]["packages"]
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    files = {"pyproject.toml", "requirements.lock", "README.md", "LICENSE"}
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == {*packages, *files}


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "HOME=/tmp"])
def test_nothing_is_fetched_at_run_time(variable: str) -> None:
    assert variable in DOCKERFILE
