"""Content-addressed store of datasets, reward models, policies: a folder's digest is its name."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from contracts.errors import CorruptArtifact, NotFound

MANIFEST = "artifact.json"
# Names files that were taken out of an artifact since people erased what was in them.
FORGOTTEN = "forgotten.json"


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str
    bytes: int


class ArtifactManifest(BaseModel):
    """What an artifact consists of. Its digest is the SHA-256 of its canonical JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class ArtifactStore:
    """Artifacts below `root`, each in a folder named by its digest. Once written, only `forget`
    changes them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, kind: str, folder: Path) -> str:
        """Copy `folder` into the store, return its digest; the same content twice is stored once.

        Written aside, flushed to disk and renamed, so that a reader sees all of it or nothing.
        """
        manifest = scan(kind, folder)
        final = self.root / manifest.digest
        if final.exists():
            return manifest.digest
        self.root.mkdir(parents=True, exist_ok=True)
        aside = self.root / f".{manifest.digest[:16]}.{uuid.uuid4().hex}"
        try:
            for entry in manifest.files:
                target = aside / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / entry.path, target)
                fsync(target)
            write_text_durably(aside / MANIFEST, manifest.model_dump_json(indent=1))
            try:
                aside.rename(final)
            except OSError:
                if not final.exists():  # another writer was first: theirs is the same bytes
                    raise
            fsync(self.root)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return manifest.digest

    def path(self, digest: str) -> Path:
        """The artifact's folder. Raises NotFound."""
        folder = self.root / digest
        if not (folder / MANIFEST).is_file():
            raise NotFound(f"no artifact {digest} in {self.root}")
        return folder

    def kept(self, name: str) -> list[str]:
        """Digests of the artifacts that have a file of this name, in alphabetical order."""
        return sorted(file.parent.name for file in self.root.glob(f"[!.]*/{name}"))

    def forget(self, digest: str, paths: Iterable[str]) -> None:
        """Delete files of an artifact for good; its manifest stays, and `verify` accepts the gap.

        The one change that an artifact sees: a person's right to erasure. Raises NotFound.
        """
        folder = self.path(digest)
        gone = self.forgotten(digest) | set(paths)
        write_text_durably(folder / FORGOTTEN, json.dumps(sorted(gone)))
        for path in gone:
            (folder / path).unlink(missing_ok=True)
        fsync(folder)

    def forgotten(self, digest: str) -> set[str]:
        """Files that were taken out of the artifact. Raises NotFound."""
        try:
            return set(json.loads((self.path(digest) / FORGOTTEN).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return set()

    def verify(self, digest: str) -> ArtifactManifest:
        """Read every byte again. Raises NotFound, or CorruptArtifact naming the first bad file."""
        folder = self.path(digest)
        try:
            manifest = ArtifactManifest.model_validate_json((folder / MANIFEST).read_bytes())
        except ValueError as e:
            raise CorruptArtifact(f"{folder / MANIFEST}: not a manifest: {e}") from e
        if manifest.digest != digest:
            raise CorruptArtifact(
                f"{folder / MANIFEST}: expected digest {digest}, got {manifest.digest}"
            )
        _check_inside(folder, manifest)
        present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {
            MANIFEST,
            FORGOTTEN,
        }
        forgotten = self.forgotten(digest)
        if extra := present - {entry.path for entry in manifest.files}:
            raise CorruptArtifact(
                f"{folder}: files that the manifest does not name: {', '.join(sorted(extra))}"
            )
        for entry in manifest.files:
            file = folder / entry.path
            if entry.path in forgotten:
                continue
            if not file.is_file():
                raise CorruptArtifact(f"{file}: missing")
            if file.stat().st_size != entry.bytes:
                raise CorruptArtifact(
                    f"{file}: expected {entry.bytes} bytes, got {file.stat().st_size}"
                )
            if (got := sha256_of(file)) != entry.sha256:
                raise CorruptArtifact(f"{file}: expected sha256 {entry.sha256}, got {got}")
        return manifest


def _check_inside(folder: Path, manifest: ArtifactManifest) -> None:
    """A link, or a path that leads out, would name bytes that may change after they were read."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise CorruptArtifact(f"{path}: expected a file of the artifact itself, got a link")
    for entry in manifest.files:
        said = PurePosixPath(entry.path)
        if said.is_absolute() or ".." in said.parts:
            raise CorruptArtifact(f"{folder / MANIFEST}: {entry.path!r} leads out of the artifact")


def scan(kind: str, folder: Path) -> ArtifactManifest:
    """The manifest of a folder as it is on disk, files in the order of their paths."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return ArtifactManifest(
        kind=kind,
        files=tuple(
            FileEntry(
                path=p.relative_to(folder).as_posix(), sha256=sha256_of(p), bytes=p.stat().st_size
            )
            for p in files
        ),
    )


def sha256_of(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text_durably(path: Path, text: str) -> None:
    """Replace `path` so that a crash leaves the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    aside.write_text(text, encoding="utf-8")
    fsync(aside)
    aside.rename(path)
    fsync(path.parent)
