"""Values that the chart refuses, by their names."""

from typing import Any

import pytest

from tests.docs import chart
from tests.docs.test_docs import ROOT
from tests.helm.conftest import Refused, Render


@pytest.mark.parametrize(
    ("example", "changes", "said"),
    [
        ("one", {"server": {"replicas": 2}}, "server.replicas: expected 1 .* got 2"),
        ("kafka", {"redis": {"existingSecret": ""}}, "redis.existingSecret: expected .* 3 replica"),
        ("kafka", {"log": {"kafka": {"existingSecret": ""}}}, "log.kafka.existingSecret: expected"),
        ("kafka", {"log": {"kafka": {"url": "kafka://me:pw@b:1/x"}}}, "log.kafka.url: "),
        ("one", {"server": {"replicas": -1}}, "server.replicas: Must be greater"),
        ("one", {"server": {"replica": 1}}, "server: Additional property replica is not"),
        ("one", {"replicas": 1}, r"\(root\): Additional property replicas is not"),
        ("one", {"image": {"digest": "latest"}}, "image.digest: Does not match"),
        ("one", {"image": {"repository": "x/y:Latest@"}}, "image.repository: Does not match"),
        ("one", {"masterKey": {"existingSecret": ""}}, "masterKey.existingSecret: "),
        ("one", {"settings": {"INSTRUCTLOOP_MAX_M": 1}}, "settings: .* INSTRUCTLOOP_MAX_M "),
        ("one", {"settings": {"INSTRUCTLOOP_MAX_N": 0}}, "settings.INSTRUCTLOOP_MAX_N: Must be g"),
        ("one", {"settings": {"INSTRUCTLOOP_MAX_N": "4"}}, "settings.INSTRUCTLOOP_MAX_N: Invalid"),
        ("one", {"settings": {"INSTRUCTLOOP_LOG_FORMAT": "xml"}}, "INSTRUCTLOOP_LOG_FORMAT"),
        ("one", {"settings": {"INSTRUCTLOOP_KEYS": "/x"}}, "settings: .* INSTRUCTLOOP_KEYS "),
        ("one", {"storage": {"size": "-5Gi"}}, "storage.size: Does not match"),
        ("one", {"server": {"scratch": "much"}}, "server.scratch: Does not match"),
        ("one", {"server": {"resources": {"limits": {"cpu": -1}}}}, "limits.cpu: Must be greater"),
        ("one", {"service": {"port": 0}}, "service.port: Must be greater"),
        ("one", {"ingress": {"host": ""}}, "ingress.host: expected a host name, got nothing"),
        ("one", {"round": {"enabled": True}}, "round.config: expected the round's TOML, got noth"),
        (
            "round",
            {"round": {"config": 'run = "x"\n[ppo]\n'}},
            "round.config: expected no run, log",
        ),
        ("round", {"round": {"data": {"existingClaim": ""}}}, "round.data.existingClaim: expected"),
        ("round", {"round": {"ranks": 0}}, "round.ranks: Must be greater"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(
    render: Render, example: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(Refused, match=said):
        render(example, **changes)


def test_a_section_of_a_round_may_have_such_keys(render: Render) -> None:
    assert render("round", round={"config": '[x]\nlog = "y"\n', "data": {"existingClaim": ""}})


def test_image_and_master_key_have_to_be_said(helm: Any) -> None:
    with pytest.raises(Refused) as refused:
        helm("template", "il", str(ROOT / "helm"))
    for name in ("image.repository", "image.digest", "masterKey.existingSecret"):
        assert f"- {name}: " in str(refused.value)


def test_every_documented_setting_can_be_given() -> None:
    """By `settings`, or by a value of its own."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    listed = {
        line.split("`")[1] for line in page.splitlines() if line.startswith("| `INSTRUCTLOOP_")
    }
    by_chart = {
        f"INSTRUCTLOOP_{name}" for name in ("LOG", "REGISTRY", "KEYS", "VAULT", "MASTER_KEY")
    }
    # Of a command, and another form of the master key.
    elsewhere = {"INSTRUCTLOOP_ADMIN_KEY", "INSTRUCTLOOP_MASTER_KEY_FILE"}
    assert listed == {*chart.settings(), *chart.SET_BY_CHART, *by_chart, *elsewhere}
