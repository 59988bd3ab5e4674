"""Releases that must not be served, of every kind that we could think of.

Each is made from a good folder: `folder` spoils the files before they are stored, so that their
digests are right; `stored` spoils what lies in the registry; `record` changes what the release says
of itself.
"""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from contracts.artifact import ArtifactManifest, FileEntry, sha256_of
from contracts.release import Release, ReleaseRegistry

WEIGHTS = "model.safetensors"
LAYER = "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"

Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """One bad release; `says` is in the reason for its refusal."""

    kind: str
    name: str
    says: str
    folder: Spoil | None = None
    stored: Spoil | None = None
    record: Callable[[dict], object] | None = None  # type: ignore[type-arg]

    def publish(self, registry: ReleaseRegistry, good: Path, release: Release, aside: Path) -> str:
        """Publish it as a copy of `release` made from the folder `good`; its id. Servers see it
        when it is as bad as it gets.
        """
        shutil.copytree(good, aside)
        (aside / "README.md").write_text(self.name)  # an artifact of its own
        if self.folder:
            self.folder(aside)
        artifact = registry.artifacts.put("policy", aside)
        bad = release.model_copy(
            update={"id": f"bad-{self.kind}-{self.name}", "artifact": artifact}
        )
        registry.pin()
        registry.publish(bad)
        file = registry.root / "releases" / f"{bad.id}.json"
        said = json.loads(file.read_text())
        if self.stored:
            moved = self.stored(registry.artifacts.path(artifact))
            said["artifact"] = moved.name if isinstance(moved, Path) else artifact
        if self.record:
            self.record(said)
        file.write_text(json.dumps(said))
        registry.unpin()
        return bad.id


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return weights(lambda w: w.update({name: value(w[name]).contiguous()}))


def filled(name: str, value: float, *, whole: bool = False) -> Spoil:
    def fill(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[slice(None) if whole else -1] = value
        return tensor

    return put(name, fill)


def fields(name: str, **changed: object) -> Spoil:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changed))

    return apply


def written(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def removed(*names: str) -> Spoil:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return apply


def cut(bytes_left: Callable[[int], int]) -> Spoil:
    def apply(folder: Path) -> None:
        os.truncate(folder / WEIGHTS, bytes_left((folder / WEIGHTS).stat().st_size))

    return apply


def flipped(name: str) -> Spoil:
    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return apply


def header(change: Callable[[dict[str, dict]], object]) -> Spoil:  # type: ignore[type-arg]
    """Rewrite the head of the weights' file, and leave the tensors' bytes as they are."""

    def apply(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        head = json.dumps(entries).encode()
        rest = content[8 + length :]
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + rest)

    return apply


def shift(entries: dict[str, dict], by: int) -> None:  # type: ignore[type-arg]
    begin, end = entries[LAYER]["data_offsets"]
    entries[LAYER]["data_offsets"] = [begin + by, end + by]


def pickled(name: str, *, instead: bool) -> Spoil:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps({"weight": [1.0]}))
        if instead:
            (folder / WEIGHTS).unlink()

    return apply


def linked(name: str, *, whole_folder: bool = False) -> Spoil:
    """Move what is stored out of the artifact, and leave a link to it."""

    def apply(folder: Path) -> None:
        outside = folder.parent / f"outside-{folder.name[:8]}"
        if whole_folder:
            outside.mkdir()
            (folder / name).symlink_to(outside)
        else:
            shutil.move(folder / name, outside)
            (folder / name).symlink_to(outside)

    return apply


def manifest(change: Callable[[list[FileEntry]], list[FileEntry]]) -> Spoil:
    def apply(folder: Path) -> None:
        file = folder / "artifact.json"
        said = ArtifactManifest.model_validate_json(file.read_bytes())
        file.write_text(
            said.model_copy(update={"files": tuple(change(list(said.files)))}).model_dump_json()
        )

    return apply


def first(**changed: object) -> Callable[[list[FileEntry]], list[FileEntry]]:
    return lambda files: [files[0].model_copy(update=changed), *files[1:]]


def sealed(lie: Spoil) -> Spoil:
    """The folder is named by the digest of the manifest that lies."""

    def apply(folder: Path) -> Path:
        lie(folder)
        said = ArtifactManifest.model_validate_json((folder / "artifact.json").read_bytes())
        return folder.rename(folder.parent / said.digest)

    return apply


def outside_entry(folder: Path) -> None:
    """The manifest names a file of the store that is not of this artifact."""
    (folder.parent / "outside.json").write_text("{}")
    digest = sha256_of(folder.parent / "outside.json")
    manifest(lambda files: [*files, FileEntry(path="../outside.json", sha256=digest, bytes=2)])(
        folder
    )


def another_kind(folder: Path) -> None:
    file = folder / "artifact.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"kind": "reward_model"}))


def sharded(wrong: bool) -> Spoil:
    """Two files instead of one, with an index that lies or a tensor that is in both."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        names = sorted(tensors)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        where = {}
        (folder / WEIGHTS).unlink()
        for i, half in enumerate(halves):
            held = half if wrong or i == 0 else [names[0], *half]
            file = f"model-{i}.safetensors"
            save_file({name: tensors[name] for name in held}, folder / file)
            where.update(dict.fromkeys(half, file))
        if wrong:
            where[names[0]] = "model-1.safetensors"
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return apply


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def canary(change: Callable[[dict], object]) -> Callable[[dict], object]:  # type: ignore[type-arg]
    return lambda record: change(record["canary"])


def off(by: float, *, all_of_them: bool) -> Callable[[dict], object]:  # type: ignore[type-arg]
    def apply(said: dict) -> None:  # type: ignore[type-arg]
        values = said["logprobs"]
        said["logprobs"] = [
            v + by if all_of_them or i == len(values) - 1 else v for i, v in enumerate(values)
        ]

    return canary(apply)


WHOLE = "a whole safetensors file"

BAD = [
    Bad("truncated", "last-byte-cut", WHOLE, cut(lambda n: n - 1)),
    Bad("truncated", "half", WHOLE, cut(lambda n: n // 2)),
    Bad("truncated", "head-only", WHOLE, cut(lambda n: 100)),
    Bad("truncated", "empty-file", WHOLE, cut(lambda n: 0)),
    Bad("NaN", "nan-one", f"{LAYER}: expected finite", filled(LAYER, float("nan"))),
    Bad("NaN", "nan-embedding", "expected finite", filled(EMBEDDING, float("nan"))),
    Bad("NaN", "nan-all", "expected finite", filled(NORM, float("nan"), whole=True)),
    Bad("infinity", "inf", "expected finite", filled(LAYER, float("inf"))),
    Bad("infinity", "minus-inf", "expected finite", filled(NORM, float("-inf"))),
    Bad("shape", "column-cut", f"{LAYER}: expected F32", put(LAYER, lambda t: t[:, :-1])),
    Bad("shape", "row-cut", f"{LAYER}: expected F32", put(LAYER, lambda t: t[:-1])),
    Bad("shape", "flat", f"{LAYER}: expected F32", put(LAYER, lambda t: t.flatten())),
    Bad("shape", "bigger-vocabulary", EMBEDDING, put(EMBEDDING, lambda t: torch.cat([t, t[:8]]))),
    Bad("shape", "norm-of-one", NORM, put(NORM, lambda t: t[:1])),
    Bad("dtype", "one-bfloat16", f"{LAYER}: expected F32", put(LAYER, lambda t: t.bfloat16())),
    Bad("dtype", "one-float64", f"{LAYER}: expected F32", put(LAYER, lambda t: t.double())),
    Bad(
        "dtype",
        "all-float16",
        "expected F32",
        weights(lambda w: w.update({k: v.half() for k, v in w.items()})),
    ),
    Bad("dtype", "norm-int32", NORM, put(NORM, lambda t: t.int())),
    Bad("missing", "no-layer", f"{LAYER}: expected a tensor", weights(lambda w: w.pop(LAYER))),
    Bad("missing", "no-norm", f"{NORM}: expected a tensor", weights(lambda w: w.pop(NORM))),
    Bad("missing", "no-embedding", EMBEDDING, weights(lambda w: w.pop(EMBEDDING))),
    Bad(
        "missing",
        "no-second-layer",
        "model.layers.1",
        weights(lambda w: [w.pop(k) for k in [*w] if k.startswith("model.layers.1.")]),
    ),
    Bad("extra", "one-more", "extra: expected no", weights(lambda w: w.update(extra=w[NORM] + 0))),
    Bad(
        "extra",
        "bias",
        "down_proj.bias: expected no",
        weights(lambda w: w.update({LAYER.replace("weight", "bias"): w[NORM] + 0})),
    ),
    Bad(
        "extra",
        "third-layer",
        "model.layers.2",
        weights(lambda w: w.update({LAYER.replace(".0.", ".2."): w[LAYER] + 0})),
    ),
    Bad("tokenizer", "other-file", "tokenizer.json", fields("tokenizer.json", version="2.0")),
    Bad(
        "tokenizer", "other-end", "tokenizer_config", fields("tokenizer_config.json", eos_token="!")
    ),
    Bad(
        "tokenizer", "other-template", "chat_template.jinja", written("chat_template.jinja", b"{}")
    ),
    Bad(
        "tokenizer", "no-tokenizer", "tokenizer", removed("tokenizer.json", "tokenizer_config.json")
    ),
    Bad("config", "other-rope", "config.rope_theta", fields("config.json", rope_theta=5.0)),
    Bad("config", "other-norm", "config.rms_norm_eps", fields("config.json", rms_norm_eps=0.1)),
    Bad("config", "no-config", "config.json: expected a file", removed("config.json")),
    Bad("config", "config-not-json", "config.json: expected JSON", written("config.json", b"{")),
    Bad("config", "config-a-list", "a JSON object", written("config.json", b"[]")),
    Bad(
        "config",
        "other-end-of-answer",
        "generation_config.eos_token_id",
        fields("generation_config.json", eos_token_id=7),
    ),
    Bad(
        "architecture",
        "other-class",
        "config.architectures",
        fields("config.json", architectures=["GPT2LMHeadModel"]),
    ),
    Bad(
        "architecture",
        "deeper",
        "config.num_hidden_layers",
        fields("config.json", num_hidden_layers=9),
    ),
    Bad(
        "code",
        "own-code",
        "config.auto_map",
        fields("config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"}),
    ),
    Bad("code", "python-file", "only data", written("modeling.py", b"import os\n")),
    Bad("pickle", "pickle-instead", "only data", pickled("pytorch_model.bin", instead=True)),
    Bad("pickle", "pickle-beside", "only data", pickled("pytorch_model.bin", instead=False)),
    Bad("pickle", "pickle-renamed", WHOLE, written(WEIGHTS, pickle.dumps({"weight": [1.0]}))),
    Bad("pickle", "pickle-pt", "only data", pickled("weights.pt", instead=False)),
    Bad("digest", "bit-of-weights", "expected sha256", stored=flipped(WEIGHTS)),
    Bad("digest", "bit-of-tokenizer", "expected sha256", stored=flipped("tokenizer.json")),
    Bad("digest", "file-gone", f"{WEIGHTS}: missing", stored=removed(WEIGHTS)),
    Bad("digest", "file-added", "does not name", stored=written("more.json", b"{}")),
    Bad("digest", "file-longer", "bytes, got", stored=cut(lambda n: n + 1)),
    Bad("manifest", "other-hash", "expected digest", stored=manifest(first(sha256="0" * 64))),
    Bad("manifest", "other-length", "expected digest", stored=manifest(first(bytes=1))),
    Bad("manifest", "file-left-out", "expected digest", stored=manifest(lambda files: files[1:])),
    Bad("manifest", "not-json", "not a manifest", stored=written("artifact.json", b"?")),
    Bad("manifest", "sealed-hash", "sha256", stored=sealed(manifest(first(sha256="0" * 64)))),
    Bad("manifest", "sealed-length", "expected 1 bytes", stored=sealed(manifest(first(bytes=1)))),
    Bad("manifest", "entry-outside", "leads out", stored=sealed(outside_entry)),
    Bad("manifest", "another-kind", "kind policy", stored=sealed(another_kind)),
    Bad("manifest", "no-manifest", "no artifact", stored=removed("artifact.json")),
    Bad("record", "not-a-record", "artifact", record=lambda r: r.pop("artifact")),
    Bad("record", "of-another-id", "the record is of", record=lambda r: r.update(id="r1")),
    Bad("record", "unknown-artifact", "no artifact", record=lambda r: r.update(artifact="0" * 64)),
    Bad("record", "artifact-outside", "no artifact", record=lambda r: r.update(artifact="../..")),
    Bad("record", "other-model", "release.model", record=lambda r: r.update(model="other")),
    Bad("canary", "one-off", "canary: expected", record=off(1.0, all_of_them=False)),
    Bad("canary", "all-off", "canary: expected", record=off(0.5, all_of_them=True)),
    Bad("canary", "too-few", "canary", record=canary(lambda c: c["logprobs"].pop())),
    Bad("canary", "no-number", "canary", record=canary(lambda c: c.update(logprobs=[None]))),
    Bad("canary", "empty", "canary", record=canary(lambda c: c.update(token_ids=[], logprobs=[]))),
    Bad("empty", "empty-folder", "expected a file", emptied),
    Bad("empty", "no-weights", "at least one safetensors file", removed(WEIGHTS)),
    Bad("link", "weights-outside", "got a link", stored=linked(WEIGHTS)),
    Bad("link", "folder-outside", "got a link", stored=linked("more", whole_folder=True)),
    Bad("header", "not-json", WHOLE, written(WEIGHTS, struct.pack("<Q", 8) + b"notjson!")),
    Bad("header", "endless", WHOLE, written(WEIGHTS, b"\xff" * 64)),
    Bad("header", "overlap", WHOLE, header(lambda e: shift(e, -8))),
    Bad("header", "past-the-end", WHOLE, header(lambda e: shift(e, 1 << 30))),
    Bad("header", "length-lies", WHOLE, header(lambda e: e[LAYER].update(shape=[1, 1]))),
    Bad("shards", "index-lies", "weight_map", sharded(wrong=True)),
    Bad("shards", "tensor-twice", "one tensor of that name", sharded(wrong=False)),
]
