"""The settings of helm/values.schema.json: what the services take, but for what the chart sets."""

import json
from pathlib import Path
from typing import Any

from contracts.environment import FromEnvironment
from feedback.log.address import KafkaSettings
from feedback.log.spool import SpoolSettings
from serving.settings import Settings

SCHEMA = Path(__file__).parents[2] / "helm" / "values.schema.json"
SET_BY_CHART = {
    *("INSTRUCTLOOP_REPLICA", "INSTRUCTLOOP_LIMIT_STORAGE", "INSTRUCTLOOP_SPOOL_PATH"),
    *("INSTRUCTLOOP_KAFKA_USERNAME", "INSTRUCTLOOP_KAFKA_PASSWORD", "INSTRUCTLOOP_KAFKA_CA"),
}
KEPT = (
    *("type", "enum", "pattern", "description"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
)
SERVICES: tuple[type[FromEnvironment], ...] = (Settings, KafkaSettings, SpoolSettings)


def schema() -> str:
    """The chart's schema with the settings as they are."""
    whole = json.loads(SCHEMA.read_text(encoding="utf-8"))
    whole["properties"]["settings"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": settings(),
    }
    return json.dumps(whole, indent=2) + "\n"


def settings() -> dict[str, dict[str, Any]]:
    """Variable to what it takes."""
    return {
        of.variable(field): {name: takes[name] for name in KEPT if name in takes}
        for of in SERVICES
        for field, takes in of.model_json_schema()["properties"].items()
        if of.variable(field) not in SET_BY_CHART
    }
