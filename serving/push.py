"""Offer: what a trainer says of the weights that it pushes; and these, received and checked.

An offer holds the artifact's manifest, and of its files what is needed to judge the model: all but
the numbers. Those follow over a transport, the tensors of each safetensors file one after another,
as they lie in the file. So a file's digest is known when its last tensor is there, and the weights
that are served are those of the artifact that the release names, byte for byte.
"""

import hashlib
import math
import struct
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from contracts.artifact import MANIFEST, ArtifactManifest, FileEntry
from contracts.errors import CorruptArtifact, InvalidInput
from contracts.prompt import TOKENIZER_FILES
from contracts.release import Release
from serving import checkpoint
from serving.checkpoint import CONFIG, CONFIGS, INDEX, Checkpoint
from serving.transport import Kind, Meeting, join, transport

if TYPE_CHECKING:
    import torch

# As safetensors calls them: torch's name, and bytes a number.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class Piece:
    """A tensor in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file: the bytes before its tensors, and its tensors in their order."""

    path: str
    sha256: str
    head: bytes
    pieces: tuple[Piece, ...]


class Offer(BaseModel):
    """A release whose weights a trainer has, and where it waits for who takes them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    release: Release
    manifest: ArtifactManifest
    # What is in the configs and in the weights' index, by file name, of those that there are.
    texts: dict[str, str]
    # The JSON at the begin of each safetensors file, by file name.
    headers: dict[str, str]
    transport: Kind
    meeting: Meeting

    @classmethod
    def of(cls, release: Release, folder: Path, kind: Kind, meeting: Meeting) -> Self:
        """Of the release's artifact, which lies in `folder`."""
        manifest = ArtifactManifest.model_validate_json((folder / MANIFEST).read_bytes())
        texts = {n: folder / n for n in (*CONFIGS, INDEX) if (folder / n).exists()}
        return cls(
            release=release,
            manifest=manifest,
            texts={name: file.read_bytes().decode() for name, file in texts.items()},
            headers={f.name: _header(f) for f in sorted(folder.glob("*.safetensors"))},
            transport=kind,
            meeting=meeting,
        )

    def checkpoint(self) -> Checkpoint:
        """The model that is offered. Raises InvalidInput where the offer contradicts itself, or is
        not of a model as plain data; CorruptArtifact where a digest differs.
        """
        if self.manifest.digest != self.release.artifact:
            raise CorruptArtifact(
                f"manifest: expected digest {self.release.artifact}, got {self.manifest.digest}"
            )
        if self.manifest.kind != "policy" or self.release.base is not None:
            raise InvalidInput("release.artifact", "an artifact of kind policy", self.manifest.kind)
        for entry in self.manifest.files:
            checkpoint.check_suffix(entry.path)
        wanted = sorted(self._entries.keys() & {*CONFIGS, INDEX})
        if wanted != sorted(self.texts):
            raise InvalidInput("texts", f"those of {wanted}", sorted(self.texts))
        said = {name: checkpoint.parsed(name, self._text(name)) for name in wanted}
        if CONFIG not in said:
            raise InvalidInput(CONFIG, "a file of this name", "none")
        tokenizer = {n: self._entry(n).sha256 for n in TOKENIZER_FILES if n in self._entries}
        checkpoint.check_tokenizer(tokenizer)
        held: dict[str, str] = {}
        tensors: checkpoint.Tensors = {}
        for file in self.files:
            for piece in file.pieces:
                if piece.name in held:
                    raise InvalidInput(piece.name, "one tensor of that name", "another")
                held[piece.name] = file.path
                tensors[piece.name] = (piece.dtype, piece.shape)
        if INDEX in said:
            checkpoint.check_index(said[INDEX], held)
        configs = {name: said[name] for name in CONFIGS if name in said}
        return Checkpoint(configs, tokenizer, tensors)

    @cached_property
    def files(self) -> tuple[WeightFile, ...]:
        """In the order in which they travel. Raises InvalidInput."""
        wanted = sorted(name for name in self._entries if name.endswith(".safetensors"))
        if not wanted or wanted != sorted(self.headers):
            raise InvalidInput("headers", f"those of {wanted}", sorted(self.headers))
        return tuple(self._file(name) for name in wanted)

    def _file(self, name: str) -> WeightFile:
        entry, header = self._entry(name), self.headers[name].encode()
        head = struct.pack("<Q", len(header)) + header
        return WeightFile(name, entry.sha256, head, _pieces(name, header, entry.bytes - len(head)))

    @cached_property
    def _entries(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.manifest.files}

    def _entry(self, name: str) -> FileEntry:
        if name not in self._entries:
            raise InvalidInput(name, "a file of the manifest", "none")
        return self._entries[name]

    def _text(self, name: str) -> bytes:
        text, entry = self.texts[name].encode(), self._entry(name)
        if (got := hashlib.sha256(text).hexdigest()) != entry.sha256:
            raise CorruptArtifact(f"{name}: expected sha256 {entry.sha256}, got {got}")
        return text


def weights(
    offer: Offer, bound_s: float, device: "torch.device"
) -> Generator[tuple[str, "torch.Tensor"], None, None]:
    """Every tensor by name, as it comes, until all are there and each file's digest is right.

    One tensor is in memory at a time. Raises Broken where the trainer leaves, is not the one that
    was meant or needs longer than `bound_s`; InvalidInput at a number that is not finite; and
    CorruptArtifact.
    """
    import torch

    line = join(offer.meeting, time.monotonic() + bound_s)
    with closing(line), closing(transport(offer.transport, line, device, sends=False)) as trainer:
        for file in offer.files:
            digest = hashlib.sha256(file.head)
            for piece in file.pieces:
                received = trainer.receive(piece.bytes)
                digest.update(received.cpu().numpy().data)
                dtype = getattr(torch, DTYPES[piece.dtype][0])
                tensor = received.view(dtype).reshape(piece.shape)
                checkpoint.check_finite(piece.name, tensor)
                yield piece.name, tensor
            if (got := digest.hexdigest()) != file.sha256:
                raise CorruptArtifact(f"{file.path}: expected sha256 {file.sha256}, got {got}")


class _Entry(BaseModel):
    """A tensor in a safetensors header."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    # From the first byte after the header: where the tensor begins, and where it has ended.
    data_offsets: list[int] = Field(min_length=2, max_length=2)


_HEADER = TypeAdapter(dict[str, _Entry])


def _pieces(file: str, header: bytes, data_bytes: int) -> tuple[Piece, ...]:
    """The tensors in the order of their bytes. Raises InvalidInput unless they cover the file from
    the first to the last, without gaps and overlaps.
    """
    content = checkpoint.parsed(file, header)
    content.pop("__metadata__", None)
    try:
        entries = _HEADER.validate_python(content)
    except ValidationError as e:
        where = ".".join(str(part) for part in e.errors()[0]["loc"])
        raise InvalidInput(
            file, f"a whole safetensors file: {where}", e.errors()[0]["msg"]
        ) from None
    pieces, at = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in DTYPES:
            raise InvalidInput(name, f"one of {' '.join(DTYPES)}", entry.dtype)
        size = math.prod(entry.shape) * DTYPES[entry.dtype][1]
        if entry.data_offsets != [at, at + size]:
            raise InvalidInput(name, f"bytes {at} to {at + size} of {file}", entry.data_offsets)
        pieces.append(Piece(name, entry.dtype, tuple(entry.shape), size))
        at += size
    if at != data_bytes:
        raise InvalidInput(file, f"{at} bytes of tensors", data_bytes)
    return tuple(pieces)


def _header(file: Path) -> str:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        return opened.read(length).decode("utf-8")
