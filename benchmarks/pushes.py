"""How long it takes until other weights stand by: pushed by a trainer, read from disk, in turn."""

from collections.abc import Callable
from typing import Any

import httpx

from benchmarks.result import Figure, figure
from contracts.release import ReleaseRegistry
from instructloop.push import push


def pushes(
    url: str, registry: ReleaseRegistry, swap_to: Callable[[str], dict[str, Any]], runs: int
) -> list[Figure]:
    """Of the server at `url`, which takes pushes and has the releases r0 and r1 on disk."""
    pushed, staged = [], []
    with httpx.Client(base_url=url, headers={"authorization": "Bearer il-root"}) as client:
        for number in range(runs):
            swap_to(f"r{number % 2}")
            release = registry.get("r1").model_copy(update={"id": f"pushed{number}"})
            registry.add(release)
            push(registry, release.id, [url], "il-root")
            taken, swapped = client.get("/v1/releases").json()["data"][-2:]
            assert (taken["source"], swapped["source"]) == ("tcp", "memory")
            pushed.append(taken["stage_ms"])
            # Neither the release that runs nor the one before it.
            read = swap_to(f"r{(number + 1) % 2}")
            assert read["source"] == "disk"
            staged.append(read["stage_ms"])
    return [figure("push_ms", pushed, "ms"), figure("stage_disk_ms", staged, "ms")]
