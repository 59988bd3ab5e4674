"""Coverage-guided fuzzing (atheris, on libFuzzer) of what reads bytes that anybody may have made:
the event decoder, the importers, the masking of personal data; and the state machines of consent
and of the log, run long.

A run crashes where anything is raised but the refusal that is meant for bad input, or where what
comes out does not hold. The seed is printed; `python -m benchmarks.fuzz TARGET FLAGS` takes the
flags of libFuzzer, and a file that crashed. A machine that fails prints the steps that led there.
QUICK=1 makes a tenth of the runs.
"""

import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import atheris
from google.protobuf.json_format import Parse

with atheris.instrument_imports(include=["contracts", "feedback"]):
    from contracts.errors import InvalidInput
    from contracts.events import TOPIC_OF, topic_of
    from contracts.v1 import events_pb2 as pb
    from feedback.importers import FORMATS, import_file
    from feedback.log.wire import Poison, decode, encode
    from feedback.pii import mask

from benchmarks.result import Figure, figure
from tests.fakes import MemorySink
from tests.feedback.machines import MACHINES, Machine, steps_of

QUICK = os.environ.get("QUICK", "") not in ("", "0")
SEED = 20261124
# Of up to 50 steps each.
MACHINE_RUNS = 300
EXAMPLES = Path(__file__).parents[1] / "proto" / "examples"
_TOPICS = sorted(set(TOPIC_OF.values()))
# A file in memory: a disk would take most of the time.
_FILE = os.memfd_create("rows")


def decode_event(data: bytes) -> None:
    """The first byte chooses the topic. What is read is written again as the same event."""
    topic = _TOPICS[data[0] % len(_TOPICS)] if data else _TOPICS[0]
    try:
        event = decode(topic, data[1:])
    except Poison:
        return
    if decode(topic, encode(event)) != event:
        raise AssertionError("an event changed when it was written again")


def import_rows(data: bytes) -> None:
    """The first byte chooses the format. A second time says the same."""
    name = sorted(FORMATS)[data[0] % len(FORMATS)] if data else "e2e"
    os.ftruncate(_FILE, 0)
    os.pwrite(_FILE, data[1:], 0)
    ids = []
    for _ in range(2):
        sink = MemorySink()
        try:
            import_file(name, Path(f"/proc/self/fd/{_FILE}"), sink)
        except InvalidInput:
            return
        ids.append([event.id for event in sink.events])
    if ids[0] != ids[1]:
        raise AssertionError("a file gave other events when it was imported again")


def mask_text(data: bytes) -> None:
    """What is masked holds nothing more to mask."""
    once = mask(data.decode("utf-8", "replace"))
    if mask(once.text).kinds:
        raise AssertionError("a masked text was masked again")


_RANKME = (
    *("mr", "_worker_id", "_trust", "_started_at", "_created_at"),
    *(f"ref{i}" for i in range(1, 6)),
    *(f"quality{i}" for i in range(1, 6)),
)

# Name to target, runs, and the bytes of an input: more than its longest seed has. Longer inputs
# take their time and hold nothing else.
TARGETS: Mapping[str, tuple[Callable[[bytes], None], int, int]] = {
    "decode_event": (decode_event, 600_000, 1024),
    "import_rows": (import_rows, 150_000, 256),
    "mask_text": (mask_text, 300_000, 256),
}


def seeds(name: str) -> list[bytes]:
    """What fuzzing starts from: good input of every kind."""
    if name == "decode_event":
        texts = [path.read_text("utf-8") for path in sorted(EXAMPLES.rglob("*.json"))]
        events = [Parse(text, pb.Event()) for text in texts]
        return [bytes([_TOPICS.index(topic_of(event))]) + encode(event) for event in events]
    if name == "import_rows":
        return [bytes([i]) + _rows(name).encode() for i, name in enumerate(sorted(FORMATS))]
    return [
        b"write to ann@example.org or call +44 20 7946 0958, from 192.0.2.7 or 2001:db8::1",
        b"card 4111 1111 1111 1111, IBAN GB82 WEST 1234 5698 7654 32, SSN 078-05-1120",
        b"password: hunter2hunter2 AKIAIOSFODNN7EXAMPLE -----BEGIN RSA PRIVATE KEY-----",
    ]


def _rows(name: str) -> str:
    return {
        "alpaca": '[{"instruction": "Say hi", "input": "", "output": "hi"}]',
        "e2e": 'mr,ref\n"name[The Mill], food[French]",The Mill serves French food.\n',
        "hh": '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", '
        '"rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}',
        "oasst": '{"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": '
        '{"message_id": "m", "text": "a", "role": "prompter", "replies": []}}',
        "rankme": ",".join(_RANKME)
        + "\nname[The Mill],w1,1,1/2/2017 10:00:00,1/2/2017 10:05:00,a,b,c,d,e,5,4,3,3,1\n",
    }[name]


def measure() -> list[Figure]:
    """Every target in a process of its own, one after the other; then the machines."""
    runs, crashes = 0, 0
    for name, (_, wanted, _) in TARGETS.items():
        done, crashed = fuzz(name, wanted // 10 if QUICK else wanted)
        print(f"{name}: {done} runs, {'a crash' if crashed else 'no crash'}, seed {SEED}")
        runs, crashes = runs + done, crashes + crashed
    steps, failures = stateful(MACHINES, MACHINE_RUNS // 10 if QUICK else MACHINE_RUNS)
    return [
        figure("fuzz_runs", [runs], "runs", ">= 1000000"),
        figure("fuzz_crashes", [crashes], "targets", "0"),
        figure("stateful_steps", [steps], "steps", ">= 10000"),
        figure("stateful_failures", [failures], "machines", "0"),
    ]


def stateful(machines: Sequence[type[Machine]], runs: int) -> tuple[int, int]:
    """Steps that were made, and how many machines found something."""
    steps, failures = 0, 0
    for machine in machines:
        before = machine.steps
        try:
            steps_of(machine, runs, database=None)
        except Exception:  # noqa: BLE001  a machine may find anything
            traceback.print_exc()
            failures += 1
        print(f"{machine.__name__}: {machine.steps - before} steps")
        steps += machine.steps - before
    return steps, failures


def fuzz(name: str, runs: int) -> tuple[int, bool]:
    """Runs that were made, and whether the last one crashed."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds(name)):
            (Path(corpus) / f"seed{number}").write_bytes(seed)
        flags = [f"-atheris_runs={runs}", f"-seed={SEED}", f"-artifact_prefix={corpus}/"]
        flags.append(f"-max_len={TARGETS[name][2]}")
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.fuzz", name, *flags, corpus],
            capture_output=True,
            text=True,
            check=False,
        )
    counts = re.findall(r"^(?:Done|#)\s?(\d+)\b", ran.stderr, re.MULTILINE)
    if not counts:
        raise RuntimeError(f"{name}: fuzzing did not start:\n{ran.stderr[-2000:]}")
    if ran.returncode:
        print(ran.stderr[-4000:], file=sys.stderr)
    return max(map(int, counts)), ran.returncode != 0


if __name__ == "__main__":
    target, *_ = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()
