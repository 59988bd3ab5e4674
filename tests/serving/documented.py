"""Schemathesis against everything that `instructloop serve` puts together, on a fake engine."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from contracts.access import SCOPES
from tests.serving.house import House

# Rules over several fields, such as best_of >= n, and over what is there, such as an output's
# index, are in no schema: these operations may answer 400 to what it allows. Consent is another
# person's, so that withdrawing it does not close everything else.
CONFIG = """
[[operations]]
include-path-regex = "completions$|^/v1/consent$|^/v1/feedback/"
include-method = ["POST", "PUT"]
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "404", "429"]

[[operations]]
include-path-regex = "^/v1/consent"
headers = {{ Authorization = "Bearer {key}" }}
"""


@dataclass(frozen=True)
class Outcome:
    """Requests that were made of the document, and what was wrong with the answers to them.

    `server_errors` are kinds of answers with 5xx, `failures` of any kind, those included, each
    counted once for an operation; `said` tells them in Schemathesis's words.
    """

    cases: int
    failures: int
    server_errors: int
    said: str


def ask_all(here: House, folder: Path, examples: int, seed: int = 1) -> Outcome:
    """All phases and all checks, with at most `examples` random cases for each operation."""
    document, config, report = (folder / n for n in ("api.json", "config.toml", "report.json"))
    document.write_text(json.dumps(_document(here)))
    config.write_text(CONFIG.format(key=here.key("cat", *SCOPES)))
    key = here.key("ann", *SCOPES)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "--no-color"),
        *("run", str(document), "--url", here.url, "--checks", "all", "--continue-on-failure"),
        *("--header", f"Authorization: Bearer {key}", "--max-examples", str(examples)),
        *("--seed", str(seed), "--no-shrink", "--generation-database", "none"),
        *("--warnings", "off", "--report-json-path", str(report)),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    said = ended.stdout + ended.stderr
    assert report.exists(), said
    here.keys.authenticate(f"Bearer {key}")  # not revoked on the way, so that all was open
    return _outcome(json.loads(report.read_text()), said)


def _outcome(report: Any, said: str) -> Outcome:
    assert report["complete"] and not report["errors"], said
    cases = report["test_cases"]
    broken = [kind["count"] for kind in report["failures"] if kind["type"] == "ServerError"]
    return Outcome(cases["generated"], cases["unique_failures"], sum(broken), said)


def _document(here: House) -> Any:
    """The served document, where it cannot know it told what is here: the model, completions."""
    document = httpx.get(f"{here.url}/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        content["application/json"]["schema"]["properties"]["model"] = {"enum": ["tiny", "tiny@r1"]}
    asked = document["paths"]["/v1/feedback/candidates"]["post"]["requestBody"]["content"]
    for schema in asked["application/json"]["schema"]["anyOf"]:
        schema["properties"]["model"] = {"enum": ["tiny"]}
        schema["properties"]["candidates"]["items"]["properties"]["release"] = {"enum": ["r1"]}
    kept = _completions(here)
    for schema in document["components"]["schemas"].values():
        if "completion_id" in schema.get("properties", {}):
            schema["properties"]["completion_id"] = {"enum": kept}
            for example in schema["examples"]:
                example["completion_id"] = kept[0]
    return document


def _completions(here: House) -> list[str]:
    """Ids of three that are kept of ann."""
    with here.openai("ann") as client:
        made = [
            client.completions.create(model="tiny", prompt="say", n=3, max_tokens=2)
            for _ in range(3)
        ]
    return [completion.id for completion in made]
