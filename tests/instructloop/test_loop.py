"""A whole round on a few events with a tiny model: real training, a real engine, a real log."""

import json
import random
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from contracts.errors import InvalidInput
from contracts.events import TOPICS, Stamper
from contracts.log import follow
from contracts.release import ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from demo.broker import Cluster
from demo.raters import rank
from demo.tasks import base_text, demonstration, gold_score, good_answer, make_task
from feedback.dataset.build import build_dataset
from feedback.log import open_log
from instructloop.config import RoundConfig, load_config
from instructloop.loop import dataset_manifest
from instructloop.round import run_round
from instructloop.serve import bring_model
from tests import tiny_models
from tests.conftest import running_server
from training.config import LoraConfig, RewardModelConfig, SftConfig

ROUND = """
model = "tiny"
run = "{folder}/run"
log = "sqlite:///{folder}/log.db"
registry = "{folder}/registry"
text = ["{folder}/text.txt"]
judge_raters = 0.4
[base]
hidden_size = 64
intermediate_size = 128
layers = 2
heads = 2
steps = 4
rows_per_step = 4
row_tokens = 32
[sft]
epochs = 1
[rules]
train_fraction = 0.6
validation_fraction = 0.1
[reward_model]
prompts_per_batch = 8
[ppo]
episodes = 32
batch = 16
minibatch = 8
ptx_examples_per_episode = 1
ptx_row_tokens = 32
max_prompt_tokens = 200
max_response_tokens = 56
[evaluation]
samples_per_prompt = 4
max_prompts = 20
[gate]
min_people = 1
min_win_rate = {win_rate}
max_lm_loss_rise = 5.0
"""
NOTICE = "1"


def said(rng: random.Random) -> Iterator[pb.Event]:
    """Twelve people: each shows two answers and ranks four, twice."""
    stamp = Stamper("test")
    for person in (f"person-{i}" for i in range(12)):
        yield stamp.event(person, pb.Consent(state=pb.CONSENT_STATE_GRANTED, notice_version=NOTICE))
        for turn in range(2):
            task = make_task(rng)
            prompt = pb.Prompt(messages=[pb.Message(role="user", content=task.prompt)])
            answer = good_answer(task, rng)
            yield stamp.event(
                person,
                pb.Demonstration(
                    prompt=prompt, response=answer, source=pb.SOURCE_API, notice_version=NOTICE
                ),
            )
            answers = [demonstration(task, rng) for _ in range(4)]
            name = f"cmpl-{person}-{turn}"
            yield stamp.event(
                person,
                pb.Completion(
                    completion_id=name,
                    prompt=prompt,
                    outputs=[
                        pb.Output(index=i, text=text, finish_reason="stop")
                        for i, text in enumerate(answers)
                    ],
                    release_id="r0000",
                    source=pb.SOURCE_API,
                    notice_version=NOTICE,
                ),
            )
            groups = rank([gold_score(task.prompt, a, True) for a in answers], rng, 0.0)
            yield stamp.event(
                person,
                pb.Ranking(
                    completion_id=name,
                    groups=[pb.RankGroup(outputs=g) for g in groups],
                    source=pb.SOURCE_API,
                    notice_version=NOTICE,
                ),
            )


def config(folder: Path, win_rate: float) -> RoundConfig:
    file = folder / "round.toml"
    text = ROUND.replace("{folder}", folder.as_posix())
    file.write_text(text.replace("{win_rate}", str(win_rate)))
    return load_config(file)


@pytest.fixture
def registry(tmp_path: Path) -> ReleaseRegistry:
    """An empty one, beside a log and a text that a round can learn from."""
    rng = random.Random(3)
    (tmp_path / "text.txt").write_text("\n\n".join(base_text(rng, 200)))
    log = open_log(f"sqlite:///{tmp_path}/log.db")
    log.append(list(said(rng)))
    log.close()
    return ReleaseRegistry(tmp_path / "registry")


@pytest.mark.vllm
def test_a_round_trains_on_a_model_that_was_brought(
    tmp_path: Path, registry: ReleaseRegistry
) -> None:
    folder = tmp_path / "mine"  # in half precision, without a chat template
    tiny_models.model(0, tied=False).bfloat16().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    brought = bring_model(registry, folder, "tiny", "test")
    assert bring_model(registry, folder, "tiny", "test") == brought
    other = tiny_models.save(tmp_path / "other", 1, tied=False)
    with pytest.raises(InvalidInput, match="--model: expected an empty registry"):
        bring_model(registry, other, "tiny", "test")
    with pytest.raises(InvalidInput, match=r"--name: expected tiny, as .*, got 'other'"):
        bring_model(registry, folder, "other", "test")

    # Its SFT checkpoint is chosen, and its reward model is one of several.
    changes = {
        "base": None,
        "sft": SftConfig(epochs=2, batch=1, learning_rate=1e-2, choose_by_reward=True),
        "reward_model": RewardModelConfig(prompts_per_batch=8, ensemble=2, folds=2),
    }
    report = run_round(config(tmp_path, win_rate=0.0).model_copy(update=changes), lambda _: None)
    rewards, policy = report["reward_model"], report["policy"]
    assert min(rewards["disagreement"], *policy["disagreement"].values()) > 0
    assert set(policy["disagreement"]) == {"disagreement_before", "disagreement_after"}
    assert sum(fold["labelers"] for fold in rewards["folds"]) == 5
    chosen = json.loads((tmp_path / "run" / "stages" / "choose" / "result.json").read_text())
    assert set(chosen["mean_rewards"]) == {"epoch-1", "epoch-2"}
    assert chosen["mean_rewards"][chosen["checkpoint"]] == max(chosen["mean_rewards"].values())
    after = registry.current()
    assert after is not None
    assert after.parent == brought.id
    assert report["release"] == {"before": brought.id, "after": after.id}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        new = registry.artifacts.path(after.artifact) / name
        assert new.read_bytes() == (folder / name).read_bytes()
    for release in (brought, after):  # a server swaps weights of one dtype only
        weights = load_file(registry.artifacts.path(release.artifact) / "model.safetensors")
        assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float32"}


@pytest.mark.kafka
@pytest.mark.vllm
def test_a_round_runs_on_kafka_by_changing_one_url(
    tmp_path: Path, registry: ReleaseRegistry, kafka: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_KAFKA_TIMEOUT_S", "30")
    monkeypatch.setenv("INSTRUCTLOOP_VAULT", str(tmp_path / "vault.db"))
    here = open_log(f"sqlite:///{tmp_path}/log.db")
    url = f"kafka://{kafka.bootstrap}/round-{uuid.uuid4().hex[:8]}?replication=1"
    there = open_log(url)
    there.append([record.event for topic in TOPICS for record in follow(here, topic, {})])
    settings = config(tmp_path, win_rate=0.0)
    expected = build_dataset(here, registry.artifacts, settings.rules, "test")
    here.close()
    there.close()

    report = run_round(settings.model_copy(update={"log": url}), lambda _: None)
    assert report["gate"]["passed"]
    assert report["dataset"]["rows"] == dataset_manifest(registry, expected).model_dump()["rows"]
    assert registry.current_id() == report["release"]["after"] != report["release"]["before"]


@pytest.mark.vllm
def test_a_round_releases_what_passes_and_refuses_what_does_not(
    tmp_path: Path, registry: ReleaseRegistry
) -> None:

    # A bar that nobody reaches: the first release stays, and the report says why.
    refused = run_round(config(tmp_path, win_rate=1.0), lambda _: None)
    first = registry.current()
    assert first is not None
    assert not refused["gate"]["passed"]
    assert "win rate by reward_model" in refused["gate"]["reasons"][0]
    assert refused["release"] == {"before": first.id, "after": first.id}
    assert registry.history() == [first.id]

    # A bar at the ground: released, by digest.
    passed = run_round(config(tmp_path, win_rate=0.0), lambda _: None)
    second = registry.current()
    assert second is not None
    assert passed["gate"] == {"passed": True, "reasons": []}
    assert second.parent == first.id
    assert second.reward_model is not None
    assert registry.artifacts.verify(second.reward_model).kind == "reward_model"
    assert registry.artifacts.verify(second.artifact).kind == "policy"
    assert len(passed["ppo"]) == 2
    assert passed["ppo"][0]["kl"] == pytest.approx(0, abs=1e-4)
    assert passed["ppo"][0]["logprob_mismatch_max"] < 1e-3
    assert set(passed["policy"]["win_rates"]) == {"reward_model", "second_reward_model"}
    assert (
        json.loads((tmp_path / "run" / "report.json").read_text())["release"]["after"] == second.id
    )

    # The same again finds every stage done and the same release.
    again = run_round(config(tmp_path, win_rate=0.0), lambda _: None)
    assert again["release"]["after"] == second.id
    assert registry.history() == [first.id, second.id]


@pytest.mark.vllm
def test_rounds_with_lora_release_adapters_of_the_weights_that_run(
    tmp_path: Path, registry: ReleaseRegistry
) -> None:
    """The second goes on from the adapter of the first."""
    settings = config(tmp_path, win_rate=0.0)
    adapted = {"lora": LoraConfig(rank=4, alpha=8), "policy_rate": 0.05, "ema": 0.0}
    changes = {
        "ppo": settings.ppo.model_copy(update=adapted),
        "gate": settings.gate.model_copy(update={"max_kl": 1e9}),
    }
    for number in range(2):
        run = {"run": tmp_path / f"run{number}"}
        run_round(settings.model_copy(update=changes | run), lambda _: None)
    whole, first, second = registry.releases()
    assert whole.base is None and first.base == second.base == whole.artifact
    assert (first.parent, second.parent) == (whole.id, first.id)
    kinds = [registry.artifacts.verify(r.artifact).kind for r in (whole, first, second)]
    assert kinds == ["policy", "adapter", "adapter"]

    registry.swap_to(first.id)
    merged = {
        release.id: tmp_path / f"run{number}/stages/ppo/model"
        for number, release in enumerate((first, second))
    }
    ask = {"model": "tiny", "prompt": list(range(5, 25)), "temperature": 0, "max_tokens": 12}
    ask |= {"ignore_eos": True, "return_token_ids": True}
    with running_server(tmp_path, registry, max_adapters=1) as (url, _, _):
        headers = {"authorization": "Bearer il-root"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            answers = []
            for release_id, folder in merged.items():
                client.post("/v1/admin/swap", json={"release": release_id}).raise_for_status()
                change = client.get("/v1/releases").json()["data"][-1]
                assert (change["release"], change["outcome"]) == (release_id, "swapped_in")
                assert change["pause_ms"] == 0
                said = client.post("/v1/completions", json=ask).json()
                assert said["system_fingerprint"] == release_id
                answers.append(said["choices"][0]["token_ids"])
                assert answers[-1] == tiny_models.continued(folder, list(range(5, 25)), 12)
    start = tiny_models.continued(registry.artifacts.path(whole.artifact), list(range(5, 25)), 12)
    assert answers[0] != start and answers[0] != answers[1]
