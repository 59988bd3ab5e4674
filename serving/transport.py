"""Transport: bytes from a trainer to a server's worker, over TCP or through their cards by NCCL.

The trainer listens, and only while it pushes; the worker comes to it, so a server opens no port.
Before anything else moves each proves to the other, by an HMAC-SHA256 of the other's nonce, that it
knows the push's secret. Bytes are numbers or digests and never objects: nothing is unpickled.
"""

import hmac
import secrets
import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from contracts.errors import InstructloopError, InvalidInput

if TYPE_CHECKING:
    import torch

Kind = Literal["tcp", "nccl"]
Buffer = bytes | memoryview

NONCE_BYTES, PROOF_BYTES = 32, 32
# How long a stranger may stand in the door, and how often the trainer looks whether it is awaited.
STRANGER_BOUND_S, LOOK_S = 10.0, 0.2
CARD_POLL_S = 0.0005


class Broken(InstructloopError):
    """The other side left, was too slow, or is not who it should be."""


class Meeting(BaseModel):
    """Where the trainer waits, and what only the two of them know: 32 bytes in hex."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    port: int = Field(ge=1, le=65535)
    secret: str = Field(repr=False, pattern="^[0-9a-f]{64}$")


class Line:
    """A connection that is over at `until`, in seconds of time.monotonic."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection, self._until = connection, until

    def send(self, data: Buffer) -> None:
        """Raises Broken."""
        try:
            self._connection.settimeout(self._left())
            self._connection.sendall(data)
        except OSError as e:
            raise Broken(f"the other side does not take the weights: {e}") from e

    def receive(self, into: memoryview) -> None:
        """Fill all of `into`. Raises Broken."""
        while into:
            try:
                self._connection.settimeout(self._left())
                got = self._connection.recv_into(into)
            except TimeoutError:
                continue  # there is no time left: said above
            except OSError as e:
                raise Broken(f"the trainer's connection failed: {e}") from e
            if not got:
                raise Broken(f"the trainer left with {len(into)} bytes of a tensor unsent")
            into = into[got:]

    def check(self) -> None:
        """Raise Broken unless there is time left and the other side is there, and silent."""
        self._left()
        if select.select([self._connection], [], [], 0)[0]:
            raise Broken("the other side left in the middle of a transfer")

    def close(self) -> None:
        self._connection.close()

    def _left(self) -> float:
        if (left := self._until - time.monotonic()) <= 0:
            raise Broken("the push took longer than it may")
        return left


def listen(host: str) -> socket.socket:
    """A port of `host` at which a trainer waits for workers."""
    return socket.create_server((host, 0), family=_family(host))


def admit(
    listener: socket.socket, meeting: Meeting, until: float, awaited: Callable[[], bool]
) -> Line | None:
    """The trainer's end of the line to the first who knows the secret; None once nobody is
    `awaited` any more.
    """
    listener.settimeout(LOOK_S)
    while awaited():
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        stranger = Line(connection, time.monotonic() + STRANGER_BOUND_S)
        try:
            nonce = secrets.token_bytes(NONCE_BYTES)
            stranger.send(nonce)
            theirs = _take(stranger, NONCE_BYTES)
            _check(_take(stranger, PROOF_BYTES), meeting, b"worker", nonce)
            stranger.send(_proof(meeting, b"trainer", theirs))
            return Line(connection, until)
        except Broken:
            stranger.close()
    return None


def join(meeting: Meeting, until: float) -> Line:
    """The worker's end. Raises Broken."""
    try:
        left = max(until - time.monotonic(), LOOK_S)
        connection = socket.create_connection((meeting.host, meeting.port), timeout=left)
    except OSError as e:
        raise Broken(f"no trainer at {meeting.host}:{meeting.port}: {e}") from e
    line = Line(connection, until)
    try:
        theirs, nonce = _take(line, NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
        line.send(nonce + _proof(meeting, b"worker", theirs))
        _check(_take(line, PROOF_BYTES), meeting, b"trainer", nonce)
    except Broken:
        line.close()
        raise
    return line


def _take(line: Line, count: int) -> bytes:
    taken = bytearray(count)
    line.receive(memoryview(taken))
    return bytes(taken)


def _proof(meeting: Meeting, role: bytes, nonce: bytes) -> bytes:
    return hmac.digest(bytes.fromhex(meeting.secret), role + nonce, "sha256")


def _check(proof: bytes, meeting: Meeting, role: bytes, nonce: bytes) -> None:
    if not hmac.compare_digest(proof, _proof(meeting, role, nonce)):
        raise Broken("the other side does not know the push's secret")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Transport(Protocol):
    """One end of a line; what one sends, the other receives in pieces of the same sizes."""

    def send(self, data: memoryview) -> None:
        """Raises Broken."""
        ...

    def receive(self, count: int) -> "torch.Tensor":
        """The next `count` bytes, uint8 [count]. Raises Broken."""
        ...

    def close(self) -> None:
        """The line is closed, too."""
        ...


def transport(kind: Kind, line: Line, device: "torch.device | None", *, sends: bool) -> Transport:
    """The trainer's end `sends`, the worker's does not; `device` is where the weights are, or shall
    be. Raises Broken, InvalidInput.
    """
    return Tcp(line) if kind == "tcp" else Nccl(line, device, sends=sends)


class Tcp:
    """Through the line itself."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def send(self, data: memoryview) -> None:
        self._line.send(data)

    def receive(self, count: int) -> "torch.Tensor":
        import torch

        received = torch.empty(count, dtype=torch.uint8)
        self._line.receive(received.numpy().data)
        return received

    def close(self) -> None:
        self._line.close()


class Nccl:
    """From the trainer's card into the worker's, by the communicator of vLLM's weight transfer. Not
    run yet on a GPU.

    The two meet by an id that goes over the line. vLLM's other way to meet, a store at a port, asks
    nobody who he is and unpickles what it is given. NCCL waits for ever for a peer that is gone:
    the line tells, and the communicator is aborted.
    """

    def __init__(self, line: Line, device: "torch.device | None", *, sends: bool) -> None:
        if device is None or device.type != "cuda":
            raise InvalidInput("push", "tcp, where there is no CUDA device", "nccl")
        from vllm.distributed.device_communicators.pynccl_wrapper import (
            NCCL_UNIQUE_ID_BYTES,
            NCCLLibrary,
        )
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        if sends:
            unique = bytes(NCCLLibrary().ncclGetUniqueId().internal)
            line.send(unique)
        else:
            unique = _take(line, NCCL_UNIQUE_ID_BYTES)
        self._line, self._device = line, device
        self._group: Any = uid_init_process_group(unique, 0 if sends else 1, 2, device)

    def send(self, data: memoryview) -> None:
        import torch

        if len(data):
            # A copy that may be written to, as torch wants it of a buffer.
            self._broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device))

    def receive(self, count: int) -> "torch.Tensor":
        import torch

        received = torch.empty(count, dtype=torch.uint8, device=self._device)
        if count:
            self._broadcast(received)
        return received

    def close(self) -> None:
        self._group.destroy()
        self._line.close()

    def _broadcast(self, data: "torch.Tensor") -> None:
        """Rank 0 sends. Over when the data is there, so that it may be freed."""
        import torch

        stream = torch.cuda.current_stream(self._device)
        self._group.broadcast(data, src=0, stream=stream)
        over = torch.cuda.Event()
        over.record(stream)
        while not over.query():
            try:
                self._line.check()
            except Broken:
                self._group.destroy()
                raise
            time.sleep(CARD_POLL_S)
