from collections.abc import Callable
from pathlib import Path

import pytest

from contracts.artifact import MANIFEST, ArtifactStore, write_text_durably
from contracts.errors import CorruptArtifact, NotFound


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("hello\n")
    (folder / "deep" / "b.bin").write_bytes(bytes(range(256)))
    return folder


def test_what_was_put_is_there(store: ArtifactStore, folder: Path) -> None:
    digest = store.put("policy", folder)
    assert (store.path(digest) / "a.txt").read_text() == "hello\n"
    manifest = store.verify(digest)
    # By coreutils' sha256sum.
    assert [(f.path, f.bytes, f.sha256) for f in manifest.files] == [
        ("a.txt", 6, "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"),
        ("deep/b.bin", 256, "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"),
    ]
    assert manifest.kind == "policy"


def test_the_same_content_has_one_name(store: ArtifactStore, folder: Path) -> None:
    digest = store.put("policy", folder)
    assert store.put("policy", folder) == digest
    assert store.put("dataset", folder) != digest
    (folder / "a.txt").write_text("other\n")
    assert store.put("policy", folder) != digest
    assert len(list(store.root.iterdir())) == 3


def test_a_failed_put_leaves_nothing(store: ArtifactStore, folder: Path) -> None:
    # The manifest's own name is taken by a folder, so the last step of writing fails.
    (folder / MANIFEST).mkdir()
    (folder / MANIFEST / "x").write_text("x")
    with pytest.raises(OSError, match=r"(?i)directory"):
        store.put("policy", folder)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: (d / "deep/b.bin").write_bytes(bytes([1, *range(1, 256)])), "b.bin.*sha256"),
        (lambda d: (d / "deep/b.bin").write_bytes(bytes(range(255))), "b.bin.*256 bytes, got 255"),
        (lambda d: (d / "more.txt").write_text("x"), "more.txt"),
        (lambda d: (d / "a.txt").unlink(), "a.txt: missing"),
        (lambda d: (d / MANIFEST).write_text("{}"), "not a manifest"),
        (
            lambda d: (d / MANIFEST).write_text(
                (d / MANIFEST).read_text().replace("policy", "other")
            ),
            "expected digest",
        ),
    ],
)
def test_every_damage_is_found(
    store: ArtifactStore, folder: Path, damage: Callable[[Path], object], told: str
) -> None:
    digest = store.put("policy", folder)
    damage(store.path(digest))
    with pytest.raises(CorruptArtifact, match=told):
        store.verify(digest)


def test_an_unknown_digest_is_not_found(store: ArtifactStore) -> None:
    with pytest.raises(NotFound, match="no artifact"):
        store.verify("0" * 64)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "current"
    write_text_durably(file, "first")
    write_text_durably(file, "second")
    assert file.read_text() == "second"
    assert list(file.parent.iterdir()) == [file]
