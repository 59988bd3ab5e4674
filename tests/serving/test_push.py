import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from safetensors.torch import load_file

from contracts.errors import CorruptArtifact, InvalidInput, NotFound
from contracts.events import Stamper
from contracts.release import ReleaseRegistry
from instructloop.push import PushRefused, push
from serving.gate import Gate
from serving.push import Offer
from serving.settings import Settings
from serving.swap import SwapOptions, WeightSwapper
from serving.transport import listen
from tests.fakes import FakeEngine, MemorySink
from tests.serving import house as houses
from tests.serving.house import House, house, served
from tests.serving.trainer import WEIGHTS, Trainer, change, written


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server on r1 that trainers may push to."""
    settings = Settings(release_poll_s=0.02, push="tcp", push_bound_s=20)
    with house(tmp_path_factory.mktemp("server"), settings) as running:
        yield running


@pytest.fixture
def trainer(here: House, tmp_path: Path) -> Trainer:
    registry = ReleaseRegistry(tmp_path / "trainer")
    return Trainer(registry, tmp_path / "aside", here.registry.get("r1"))


def key(here: House) -> str:
    return here.key("root", "admin")


def serving(here: House) -> str:
    release: str = httpx.get(f"{here.url}/readyz").json()["release"]
    return release


def changes(here: House) -> list[tuple[str, str, str]]:
    with here.client("bob") as client:
        data = client.get("/v1/releases").json()["data"]
    return [(change["release"], change["outcome"], change["source"]) for change in data]


def test_what_a_trainer_pushes_is_served_without_a_file_of_it(
    here: House, trainer: Trainer
) -> None:
    pushed, stagings = trainer.release("p1", 0.5), here.engine.stagings
    before = len(changes(here))
    push(trainer.registry, "p1", [here.url + "/"], key(here))
    assert serving(here) == here.registry.current_id() == "p1"
    assert here.registry.get("p1") == pushed
    sent = load_file(trainer.path(pushed) / WEIGHTS)
    assert here.engine.received.keys() == sent.keys()
    assert all(torch.equal(here.engine.received[name], sent[name]) for name in sent)
    assert changes(here)[before:] == [("p1", "loaded", "tcp"), ("p1", "swapped_in", "memory")]
    with pytest.raises(NotFound):
        here.registry.artifacts.path(pushed.artifact)
    with here.client("ann") as client:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 2}
        assert client.post("/v1/completions", json=asked).json()["system_fingerprint"] == "p1"
    with here.client("root", "admin") as root:
        text = root.get("/metrics").text
        assert 'instructloop_swaps_total{outcome="loaded",release="p1",source="tcp"} 1.0' in text
        assert root.post("/v1/admin/rollback").json()["serving"] == "r1"
        assert root.post("/v1/admin/swap", json={"release": "p1"}).json()["serving"] == "p1"
        assert root.post("/v1/admin/rollback").json()["serving"] == "r1"
    assert here.engine.stagings == stagings


def test_a_release_over_a_pushed_one_is_held_against_the_same_model(
    here: House, trainer: Trainer
) -> None:
    """Its own artifact is on no disk of the server."""
    trainer.release("over-1", 1.0)
    trainer.release("over-2", 2.0, parent="over-1")
    other = trainer.release("over-3", 3.0, change(lambda t: t.pop("weight")))
    for release_id in ("over-1", "over-2"):
        push(trainer.registry, release_id, [here.url], key(here))
        assert serving(here) == release_id
    with pytest.raises(PushRefused, match="weight: expected a tensor of this name"):
        push(trainer.registry, other.id, [here.url], key(here))
    from_disk = trainer.release("over-4", 4.0, parent="over-2")
    here.registry.artifacts.put("policy", trainer.path(from_disk))
    with here.client("root", "admin") as root:
        here.registry.add(from_disk)
        assert root.post("/v1/admin/swap", json={"release": "over-4"}).json()["serving"] == "over-4"
    assert changes(here)[-1] == ("over-4", "swapped_in", "disk")
    to_first(here)


def to_first(here: House) -> None:
    with here.client("root", "admin") as root:
        assert root.post("/v1/admin/swap", json={"release": "r1"}).json()["serving"] == "r1"


@pytest.mark.parametrize(
    ("says", "spoil", "record"),
    [
        ("extra: expected no tensor", change(lambda t: t.update(extra=torch.ones(1))), {}),
        ("weight: expected F32 (1,)", change(lambda t: t.update(weight=torch.ones(2))), {}),
        ("weight: expected F32 (1,)", change(lambda t: t.update(weight=torch.ones(1).half())), {}),
        ("weight: expected finite", change(lambda t: t["weight"].fill_(float("nan"))), {}),
        ("weight: expected finite", change(lambda t: t["weight"].fill_(float("inf"))), {}),
        ("tokenizer.json: expected the tokenizer", written("tokenizer.json", "[]"), {}),
        ("config.vocab_size", written("config.json", '{"vocab_size": 3}'), {}),
        ("config.json: expected JSON", written("config.json", "{"), {}),
        ("generation_config.json: expected no file", written("generation_config.json", "{}"), {}),
        ("only data", written("modeling.py", "import os"), {}),
        ("at least one tokenizer", lambda folder: (folder / "tokenizer.json").unlink(), {}),
        ("release.model: expected tiny", None, {"model": "other"}),
        ("release.id: expected an id that is not taken", None, {"id": "r1-again"}),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_bad_push_is_refused_with_its_reason_and_touches_nothing(
    here: House,
    trainer: Trainer,
    says: str,
    spoil: Callable[[Path], object] | None,
    record: dict[str, Any],
) -> None:
    here.registry.add(trainer.served.model_copy(update={"id": "r1-again"}))
    bad = trainer.release(f"bad-{trainer.aside.parent.name}", 1.0, spoil or bool, **record)
    before, swaps = here.registry.turns(), here.engine.swaps
    with pytest.raises(PushRefused) as refused:
        push(trainer.registry, bad.id, [here.url], key(here))
    assert says in str(refused.value) and bad.id in str(refused.value)
    assert changes(here)[-1] == (bad.id, "refused", "tcp")
    assert here.registry.turns() == before and here.engine.swaps == swaps
    assert here.engine.staged is None or here.engine.staged.name != bad.artifact
    assert serving(here) == "r1"


def test_bytes_that_differ_from_the_manifest_are_refused_and_the_next_push_works(
    here: House, trainer: Trainer
) -> None:
    bad, good = trainer.release("flipped", 1.0), trainer.release("whole", 2.0)
    file = trainer.path(bad) / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    with pytest.raises(PushRefused, match=rf"{WEIGHTS}: expected sha256"):
        push(trainer.registry, bad.id, [here.url], key(here))
    assert here.engine.staged is None and serving(here) == "r1"
    file.write_bytes(content[:-4])
    with pytest.raises(CorruptArtifact, match=f"{WEIGHTS}: it ends within"):
        push(trainer.registry, bad.id, [here.url], key(here))
    assert changes(here)[-1] == (bad.id, "refused", "tcp")
    with pytest.raises(NotFound):
        here.registry.get(bad.id)
    push(trainer.registry, good.id, [here.url], key(here))
    assert serving(here) == good.id
    to_first(here)


def test_trainer_that_is_killed_in_the_middle_leaves_nothing_behind(
    here: House, trainer: Trainer
) -> None:
    trainer.release("killed", 1.0)
    command = [sys.executable, "-m", "tests.serving.half_trainer", str(trainer.registry.root)]
    with subprocess.Popen(
        [*command, "killed", here.url, key(here)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        process.kill()
    with here.client("root", "admin") as root:  # answered when the push is over
        assert root.post("/v1/admin/swap", json={"release": "r1"}).status_code == 200
    with here.client("ann") as client:
        last = client.get("/v1/releases").json()["data"][-1]
    assert "the trainer left with" in last["reason"]
    assert changes(here)[-1] == ("killed", "refused", "tcp")
    assert here.engine.staged is None and serving(here) == "r1"
    push(trainer.registry, "killed", [here.url], key(here))
    assert serving(here) == "killed"
    to_first(here)


def test_trainer_that_is_interrupted_before_anybody_came_lets_the_server_go(
    here: House, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    trainer.release("interrupted", 1.0)
    monkeypatch.setattr("instructloop.push.admit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        push(trainer.registry, "interrupted", [here.url], key(here))
    with here.client("ann") as client:
        last = client.get("/v1/releases").json()["data"][-1]
    assert last["outcome"] == "refused" and "longer than it may" not in last["reason"]


def test_trainer_that_is_not_there_or_says_nothing_is_given_up(
    tmp_path: Path, here: House, trainer: Trainer
) -> None:
    release = trainer.release("silent", 1.0)
    with listen("127.0.0.1") as silent:
        port = silent.getsockname()[1]
        settings = Settings(release_poll_s=0.02, push="tcp", push_bound_s=0.3)
        body = trainer.offered(release, port)
        with house(tmp_path / "hasty", settings) as hasty, hasty.client("root", "admin") as root:
            answer = root.post("/v1/admin/push", json=body)
            assert answer.status_code == 409 and "longer than it may" in answer.text
    with here.client("root", "admin") as root:
        answer = root.post("/v1/admin/push", json=trainer.offered(release, port))
        assert answer.status_code == 409 and "no trainer at 127.0.0.1" in answer.text
        answer = root.post("/v1/admin/push", json=trainer.offered(release, port, transport="nccl"))
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "transport"
    assert serving(here) == "r1"


def test_nobody_but_an_operator_may_push_and_by_default_nobody_may(
    here: House, trainer: Trainer, tmp_path: Path
) -> None:
    trainer.release("unwanted", 1.0)
    for who in ("nobody", here.key("ann"), here.key("kim", "metrics", "label")):
        with pytest.raises(PushRefused, match=r"unknown or revoked|insufficient permissions"):
            push(trainer.registry, "unwanted", [here.url], who)
    with here.client("ann") as ann:
        assert ann.post("/v1/admin/push", json={}).status_code == 403
    assert httpx.post(f"{here.url}/v1/admin/push", json={}).status_code == 401
    with house(tmp_path / "default") as closed:
        with closed.client("root", "admin") as root:
            assert root.post("/v1/admin/push", json={}).status_code == 404
        with pytest.raises(InvalidInput, match="a server with INSTRUCTLOOP_PUSH set"):
            push(trainer.registry, "unwanted", [closed.url], key(closed))


def test_nothing_is_sent_unless_all_servers_take_pushes(
    here: House, trainer: Trainer, tmp_path: Path
) -> None:
    """The second one does not know the key."""
    trainer.release("shared", 1.0)
    before = changes(here)
    with house(tmp_path / "second", Settings(release_poll_s=0.02, push="tcp")) as second:
        with pytest.raises(PushRefused, match=rf"{second.url}: .*unknown or revoked\.$"):
            push(trainer.registry, "shared", [here.url, second.url], key(here))
        assert serving(here) == serving(second) == "r1"
    assert changes(here) == before


def test_release_that_one_server_refuses_is_swapped_to_by_none_and_waits_at_the_others(
    here: House, trainer: Trainer, tmp_path: Path
) -> None:
    """The second one knows another release by that name."""
    trainer.release("halfway", 1.0)
    (tmp_path / "keys.db").symlink_to(here.registry.root.parent / "keys.db")
    with house(tmp_path, Settings(release_poll_s=0.02, push="tcp")) as second:
        admin = key(here)
        second.registry.add(trainer.served.model_copy(update={"id": "halfway"}))
        said = rf"{second.url}: .*not taken.* \(halfway is beside what it serves at {here.url}\)$"
        with pytest.raises(PushRefused, match=said):
            push(trainer.registry, "halfway", [here.url, second.url], admin)
        assert serving(here) == serving(second) == "r1"
    assert changes(here)[-1] == ("halfway", "loaded", "tcp")
    push(trainer.registry, "halfway", [here.url], admin)
    assert changes(here)[-1] == ("halfway", "swapped_in", "memory")
    to_first(here)


def test_swap_that_one_server_refuses_names_those_that_serve_the_release(
    here: House, trainer: Trainer, tmp_path: Path
) -> None:
    """The second one is pinned."""
    trainer.release("uneven", 1.0)
    (tmp_path / "keys.db").symlink_to(here.registry.root.parent / "keys.db")
    with house(tmp_path, Settings(release_poll_s=0.02, push="tcp")) as second:
        admin = key(here)
        second.registry.pin("r1")
        with pytest.raises(PushRefused, match=rf"pinned.* \(uneven is served at {here.url}\)$"):
            push(trainer.registry, "uneven", [here.url, second.url], admin)
        assert (serving(here), serving(second)) == ("uneven", "r1")
    to_first(here)


def test_replicas_of_one_registry_take_a_push_each_and_swap(
    here: House, trainer: Trainer, tmp_path: Path
) -> None:
    release, root = trainer.release("everywhere", 1.0), tmp_path / "replica"
    root.mkdir()
    (root / "registry").symlink_to(here.registry.root)
    with here.client("root", "admin") as client:
        admin = client.headers["authorization"].removeprefix("Bearer ")
    (root / "keys.db").symlink_to(here.registry.root.parent / "keys.db")
    settings = Settings(release_poll_s=0.02, push="tcp", replica="second")
    with house(root, settings, published=True) as second:
        push(trainer.registry, "everywhere", [here.url, second.url], admin)
        assert serving(here) == serving(second) == "everywhere"
        assert changes(second)[-2][1:] == ("loaded", "tcp")
        assert second.engine.stagings == 0
        with pytest.raises(NotFound):
            here.registry.artifacts.path(release.artifact)
        to_first(here)


@pytest.mark.parametrize("release_id", ["r1", "known"])
def test_another_release_of_an_id_that_is_taken_is_refused_before_its_weights_move(
    here: House, trainer: Trainer, release_id: str
) -> None:
    """Be it the one that is served, or one that the registry knows."""
    if release_id == "known":
        here.registry.add(trainer.served.model_copy(update={"id": "known"}))
    trainer.release(release_id, 1.0)
    here.engine.received.clear()
    with pytest.raises(PushRefused, match=r"release\.id: expected an id that is not taken"):
        push(trainer.registry, release_id, [here.url], key(here))
    assert changes(here)[-1] == (release_id, "refused", "tcp")
    assert not here.engine.received and serving(here) == "r1"


def test_the_release_that_is_served_is_there_already(here: House, trainer: Trainer) -> None:
    shutil.copytree(here.registry.root, trainer.registry.root)
    before = changes(here)
    push(trainer.registry, "r1", [here.url], key(here))
    assert serving(here) == "r1" and changes(here) == before


def test_a_server_that_serves_nothing_yet_takes_no_push_and_goes_on_waiting(
    trainer: Trainer, tmp_path: Path
) -> None:
    swapper = WeightSwapper(
        FakeEngine(),
        ReleaseRegistry(tmp_path / "empty"),
        Gate(),
        MemorySink(),
        Stamper("test"),
        SwapOptions(),
    )
    offer = Offer.model_validate(trainer.offered(trainer.release("early", 1.0), 9))

    async def while_it_loads() -> str | None:
        async with swapper._looking:  # as the load of the first release does
            return await asyncio.wait_for(swapper.receive(offer), 10)

    assert "loaded its first release" in (asyncio.run(while_it_loads()) or "")
    assert swapper.state == "loading"


def test_what_answers_as_no_server_of_ours_is_refused(trainer: Trainer) -> None:
    trainer.release("astray", 1.0)
    older, other = FastAPI(), FastAPI()
    older.get("/v1/admin/status")(lambda: {"object": "status"})
    with served(older) as url, pytest.raises(InvalidInput, match="INSTRUCTLOOP_PUSH"):
        push(trainer.registry, "astray", [url], "key")
    with served(other) as url, pytest.raises(PushRefused, match="status 404"):
        push(trainer.registry, "astray", [url], "key")
    with pytest.raises(PushRefused, match=r"http://server:port: Invalid port"):
        push(trainer.registry, "astray", ["http://server:port"], "key")


def test_a_config_travels_byte_for_byte(here: House, trainer: Trainer) -> None:
    """Whoever wrote it ended its lines in two bytes."""
    trainer.release("lines", 1.0, lambda folder: (folder / "config.json").write_bytes(b"{\r\n}"))
    push(trainer.registry, "lines", [here.url], key(here))
    assert serving(here) == "lines"
    to_first(here)


def test_adapter_and_unknown_release_are_not_pushed(here: House, trainer: Trainer) -> None:
    trainer.release("adapted", 1.0, base="0" * 64)
    with pytest.raises(InvalidInput, match="release: expected one of whole weights"):
        push(trainer.registry, "adapted", [here.url], key(here))
    with pytest.raises(NotFound):
        push(trainer.registry, "unknown", [here.url], key(here))
    trainer.release("fine", 1.0)
    with pytest.raises(PushRefused, match=r"127\.0\.0\.1:9: "):
        push(trainer.registry, "fine", ["http://127.0.0.1:9"], key(here))


def test_address_that_is_no_server_of_ours_is_said_to_be_none(trainer: Trainer) -> None:
    trainer.release("astray", 1.0)
    other = FastAPI()
    other.get("/empty/v1/admin/status")(lambda: {"models": []})
    other.get("/page/v1/admin/status")(lambda: HTMLResponse("welcome"))
    with houses.served(other) as url:
        for path, status in (("", 404), ("/empty", 200), ("/page", 200)):
            with pytest.raises(PushRefused, match=rf"a reply of Instructloop, .* {status}$"):
                push(trainer.registry, "astray", [url + path], "il-root")
    for wrong in ("127.0.0.1:8000", "http://[::1"):
        with pytest.raises(PushRefused, match=re.escape(wrong)):
            push(trainer.registry, "astray", [wrong], "il-root")


@pytest.mark.parametrize("wrong", ["il-secret\n", "il-secret…"])
def test_key_that_can_be_none_is_not_sent_and_not_repeated(trainer: Trainer, wrong: str) -> None:
    trainer.release("keyless", 1.0)
    with pytest.raises(InvalidInput, match="--key: expected a key") as refused:
        push(trainer.registry, "keyless", ["http://127.0.0.1:9"], wrong)
    assert "secret" not in str(refused.value)


def test_start_after_a_push_serves_what_is_stored_until_the_artifact_is_there(
    here: House, trainer: Trainer, tmp_path: Path
) -> None:
    """A registry as a server leaves it that was pushed to, and ends."""
    settings = Settings(release_poll_s=0.02, push="tcp")
    with house(tmp_path / "restarted", settings) as restarted:
        release = trainer.release("volatile", 1.0)
        push(trainer.registry, "volatile", [restarted.url], key(restarted))
    shutil.copytree(tmp_path / "restarted" / "registry", tmp_path / "again" / "registry")
    with house(tmp_path / "again", settings, published=True) as again:
        assert serving(again) == "r1"
        assert changes(again)[0] == ("volatile", "refused", "disk")
        again.registry.artifacts.put("policy", trainer.path(release))
        with again.client("root", "admin") as root:
            said = root.post("/v1/admin/swap", json={"release": "volatile"}).json()
        assert said["serving"] == "volatile"
