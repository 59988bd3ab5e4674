"""docs/api.md, followed by a new user."""

import re
from pathlib import Path

from typer.testing import CliRunner

from instructloop.cli import app
from tests.serving.house import house

JSON = {"content-type": "application/json"}
PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_what_the_page_says_works(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    bodies = re.findall(r"^\| `POST (/v1/feedback/\w+)` \| `(\{.*?\})`", text, re.MULTILINE)
    commands = re.findall(r"^\.venv/bin/instructloop (keys .*)$", text, re.MULTILINE)
    consents = re.findall(r"^\| `PUT /v1/consent` \| `(\{.*?\})`", text, re.MULTILINE)
    (new_key,) = re.findall(r"^\| `POST /v1/admin/keys` \| `(\{.*?\})`", text, re.MULTILINE)
    assert (len(programs), len(bodies), len(commands), len(consents)) == (2, 4, 3, 3)
    with house(tmp_path) as here:
        for command in commands:
            words = [*command.split(), "--keys", str(tmp_path / "keys.db")]
            told = CliRunner().invoke(app, words)
            assert told.exit_code == 0, told.output
        key = here.key("ann")
        program = programs[0].replace("http://127.0.0.1:8000", here.url).replace("il-...", key)
        names: dict[str, object] = {}
        exec(program.replace('"mine"', '"tiny"'), names)  # noqa: S102  our own page
        answer = names["answer"].id  # type: ignore[attr-defined]
        with here.client("ann") as client:
            for path, body in bodies:
                said = body.replace("ID", f'"{answer}"')
                reply = client.post(path, content=said, headers=JSON)
                assert reply.status_code == 200, reply.text
        exec(programs[1], names)  # noqa: S102
        assert here.events("withdrawals")[0].withdrawal.completion_id == answer
        with here.client("bob") as client:
            replies = [client.put("/v1/consent", content=body, headers=JSON) for body in consents]
            assert [reply.json()["granted"] for reply in replies] == [True, False, False]
        with here.client("op", "admin") as client:
            made = client.post("/v1/admin/keys", content=new_key, headers=JSON)
            assert made.json()["user_id"] == "user-1"
