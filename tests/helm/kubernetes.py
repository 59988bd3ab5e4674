"""What a Kubernetes takes, by its own description, strictly: a misspelt field is a fault."""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft4Validator

# Numbers may stand for these.
LOOSE = ("io.k8s.apimachinery.pkg.api.resource.Quantity", "io.k8s.apimachinery.pkg.util.intstr")


class Kinds:
    """The kinds of an OpenAPI description in a file."""

    def __init__(self, swagger: Path) -> None:
        definitions = json.loads(swagger.read_text(encoding="utf-8"))["definitions"]
        self._definitions = {name: _strict(name, of) for name, of in definitions.items()}
        self._names = {
            (kind["group"], kind["version"], kind["kind"]): name
            for name, of in definitions.items()
            for kind in of.get("x-kubernetes-group-version-kind", [])
        }

    def faults(self, found: dict[str, Any]) -> list[str]:
        """What is wrong with an object; KeyError for a kind that is not described."""
        group, _, version = found["apiVersion"].rpartition("/")
        name = self._names[group, version, found["kind"]]
        whole = {"definitions": self._definitions, "$ref": f"#/definitions/{name}"}
        return [f"{e.json_path}: {e.message}" for e in Draft4Validator(whole).iter_errors(found)]


def _strict(name: str, of: dict[str, Any]) -> dict[str, Any]:
    if name.startswith(LOOSE):
        return {"type": ["string", "number"]}
    return of | {"additionalProperties": False} if "properties" in of else of
