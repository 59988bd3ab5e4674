import inspect
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
import torch

from contracts.errors import InvalidInput
from serving.transport import Broken, Line, Meeting, Nccl, Tcp, admit, join, listen

SECRET, OTHER = "5e" * 32, "07" * 32


def later(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


@contextmanager
def met(secret: str = SECRET, known: str = SECRET) -> Iterator[tuple[Line, Line]]:
    """The trainer's end and the worker's, where both know the same."""
    with closing(listen("127.0.0.1")) as listener, ThreadPoolExecutor(1) as aside:
        port = listener.getsockname()[1]
        mine = Meeting(host="127.0.0.1", port=port, secret=secret)
        awaited = threading.Event()
        admitted = aside.submit(admit, listener, mine, later(), lambda: not awaited.is_set())
        try:
            with closing(join(mine.model_copy(update={"secret": known}), later())) as worker:
                trainer = admitted.result()
                assert trainer is not None
                with closing(trainer):
                    yield trainer, worker
        finally:
            awaited.set()


def test_bytes_come_as_they_went() -> None:
    with met() as (trainer, worker), ThreadPoolExecutor(1) as aside:
        sent = torch.arange(3_000_000, dtype=torch.int32)
        sending = aside.submit(Tcp(trainer).send, sent.numpy().data.cast("B"))
        received = Tcp(worker).receive(12_000_000)
        sending.result()
        assert torch.equal(received.view(torch.int32), sent)
        assert Tcp(worker).receive(0).numel() == 0


def test_worker_that_does_not_know_the_secret_gets_nothing() -> None:
    with pytest.raises(Broken, match=r"left|failed"), met(known=OTHER):
        pass


def test_strangers_do_not_keep_the_worker_out() -> None:
    with closing(listen("127.0.0.1")) as listener, ThreadPoolExecutor(1) as aside:
        host, port = listener.getsockname()
        meeting = Meeting(host=host, port=port, secret=SECRET)
        admitted = aside.submit(admit, listener, meeting, later(), lambda: True)
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n" * 10):
            with socket.create_connection((host, port)) as stranger:
                stranger.sendall(said)
        with closing(join(meeting, later())):
            trainer = admitted.result()
            assert trainer is not None
            trainer.close()


def test_trainer_that_does_not_know_the_secret_is_not_listened_to() -> None:
    """It answers the worker's nonce, with another secret."""
    with closing(listen("127.0.0.1")) as listener, ThreadPoolExecutor(1) as aside:
        host, port = listener.getsockname()

        def pretend() -> bytes:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(bytes(32))
                said = connection.recv(64, socket.MSG_WAITALL)
                connection.sendall(bytes(32))
                return said

        said = aside.submit(pretend)
        with pytest.raises(Broken, match="does not know"):
            join(Meeting(host=host, port=port, secret=SECRET), later())
        assert bytes.fromhex(SECRET) not in said.result()


def test_trainer_stops_waiting_when_nobody_will_come() -> None:
    with closing(listen("127.0.0.1")) as listener:
        host, port = listener.getsockname()
        meeting = Meeting(host=host, port=port, secret=SECRET)
        assert admit(listener, meeting, later(), lambda: False) is None
    with pytest.raises(Broken, match="no trainer at"):
        join(meeting, later())


def test_transfer_ends_with_the_other_side_and_with_its_time() -> None:
    with met() as (trainer, worker):
        trainer.send(b"half")
        trainer.close()
        with pytest.raises(Broken, match="left with 4 bytes"):
            Tcp(worker).receive(8)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        socket.create_connection(silent.getsockname()) as connection,
        pytest.raises(Broken, match="longer than it may"),
    ):
        Line(connection, later(0.05)).receive(memoryview(bytearray(1)))


def test_nccl_is_refused_without_a_gpu() -> None:
    with met() as (_, worker), pytest.raises(InvalidInput, match="push: expected tcp"):
        Nccl(worker, torch.device("cpu"), sends=False)


def test_vllm_has_what_nccl_needs_of_it() -> None:
    """As far as that shows without a GPU: names, arguments, and an id that passes through bytes."""
    from vllm.distributed.device_communicators import pynccl, pynccl_wrapper
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    assert list(inspect.signature(uid_init_process_group).parameters) == [
        *("nccl_unique_id_bytes", "rank", "world_size", "device")
    ]
    broadcast = inspect.signature(pynccl.PyNcclCommunicator.broadcast)
    broadcast.bind(None, torch.empty(1), src=0, stream=None)
    assert callable(pynccl.PyNcclCommunicator.destroy)
    assert callable(pynccl_wrapper.NCCLLibrary.ncclGetUniqueId)
    unique = pynccl_wrapper.ncclUniqueId()
    unique.internal[5] = -3
    assert len(bytes(unique.internal)) == pynccl_wrapper.NCCL_UNIQUE_ID_BYTES
    assert bytes(unique.internal)[5] == 253
    assert pynccl_wrapper.ncclDataTypeEnum.from_torch(torch.uint8) is not None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_bytes_come_through_two_cards_as_they_went() -> None:
    with met() as (trainer, worker), ThreadPoolExecutor(1) as aside:
        sent = torch.arange(1 << 24, dtype=torch.int32)
        content = sent.numpy().data.cast("B")

        def send() -> None:
            sender = Nccl(trainer, torch.device("cuda:0"), sends=True)
            with torch.cuda.device(0), closing(sender):
                sender.send(content[:8])
                sender.send(content[8:])
                assert received.wait(60)

        received = threading.Event()
        sending = aside.submit(send)
        receiver = Nccl(worker, torch.device("cuda:1"), sends=False)
        with torch.cuda.device(1), closing(receiver):
            parts = [receiver.receive(8), receiver.receive(len(content) - 8)]
            received.set()
            assert torch.equal(torch.cat(parts).cpu().view(torch.int32), sent)
            sending.result()
            with pytest.raises(Broken):  # of a trainer that is gone
                receiver.receive(8)
