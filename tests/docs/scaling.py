"""The arithmetic of docs/scaling.md: memory and time of PPO-ptx on many GPUs.

Bytes, floating-point operations and seconds of one model, one token or one iteration, as each name
says. tests/training/test_scaling.py holds the formulas to what real models take.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama: width, feed-forward width, layers, heads, key heads, width of a head, vocabulary."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    key_heads: int
    head: int
    vocab: int

    @property
    def parameters(self) -> int:
        """Untied embedding and unembedding; per layer attention, feed-forward, two norms."""
        attention = 2 * self.hidden * self.head * (self.heads + self.key_heads)
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return 2 * self.vocab * self.hidden + self.layers * layer + self.hidden

    def kv_cache(self, width: int) -> int:
        """Bytes a token: a key and a value in every layer, `width` bytes a number."""
        return 2 * self.layers * self.key_heads * self.head * width

    def kept(self, scores: int = 0) -> int:
        """Numbers a token that one layer keeps for its backward pass without checkpointing.

        Six times the width: the layer's input and its norm, queries, attention's output, the
        stream before the feed-forward and its norm. Keys and values. Four times the feed-forward
        width: gate, its activation, up, their product. Two for the norms. Attention that stores its
        weights adds `scores`, the tokens of a sequence, for every head; flash attention does not.
        """
        wide = 6 * self.hidden + 2 * self.key_heads * self.head + 4 * self.ffn + 2
        return wide + self.heads * scores

    def checkpointed(self, tokens: int, width: int) -> int:
        """Bytes alive in a pass over `tokens` with a checkpoint at every layer: the inputs of all
        layers, and what one layer keeps while it is computed again.
        """
        return width * tokens * (self.layers * self.hidden + self.kept())

    def forward(self, length: int) -> float:
        """Operations a token in sequences of `length`: 2 for each weight but the embedding's, and
        attention over half of the sequence on average.
        """
        weights = self.parameters - self.vocab * self.hidden
        return 2 * weights + 2 * self.layers * self.heads * self.head * length


# Bytes a weight. Trained in mixed precision: bf16 weight and gradient, float32 copy and Adam's two
# moments (arXiv 1910.02054, 3.1); in float32 under autocast, as here, it is 4 + 4 + 8.
TRAINED, FROZEN, AVERAGE = 16, 2, 4
# Policy with its average, value network, reference and reward model; the engine has a copy too.
STATE = (TRAINED + AVERAGE) + TRAINED + FROZEN + FROZEN


@dataclass(frozen=True)
class Machine:
    """GPUs of the H100 SXM kind in nodes of 8, by the datasheets of GPU and DGX H100."""

    gpus: int
    memory: float = 80e9
    compute: float = 989e12  # bf16, dense
    bandwidth: float = 3.35e12
    nvlink: float = 450e9  # each direction
    network: float = 8 * 50e9  # each direction, of a node
    # Shares that are reached: assumptions.
    busy: float = 0.4
    reads: float = 0.6
    usable: float = 0.9

    @property
    def link(self) -> float:
        """What a collective over all GPUs runs at: the slower of NVLink and the node's network."""
        return self.nvlink if self.gpus <= 8 else min(self.nvlink, self.network)


@dataclass(frozen=True)
class Work:
    """An iteration: the paper's episodes; the lengths are an assumption."""

    episodes: int = 512
    minibatch: int = 64
    prompt: int = 256
    response: int = 256
    ptx_tokens: int = 8 * 128  # an episode
    iterations: int = 500  # 256,000 episodes

    @property
    def length(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class Plan:
    """A policy on a machine, all four models of its size, each engine on `parallel` GPUs."""

    shape: Shape
    machine: Machine
    parallel: int
    work: Work = Work()

    @property
    def state(self) -> float:
        """Bytes on a GPU: everything sharded over all of them."""
        return self.shape.parameters * STATE / self.machine.gpus

    @property
    def engine(self) -> float:
        return self.shape.parameters * FROZEN / self.parallel

    @property
    def episodes(self) -> float:
        """Of a minibatch, on a GPU."""
        return max(1, self.work.minibatch / self.machine.gpus)

    @property
    def activations(self) -> float:
        """Of the largest pass, PPO's or ptx's; they do not run at once."""
        tokens = self.episodes * max(self.work.length, self.work.ptx_tokens)
        return self.shape.checkpointed(int(tokens), 2)

    @property
    def left(self) -> float:
        """For the rollouts' KV cache, on a GPU."""
        machine = self.machine
        return machine.memory * machine.usable - self.state - self.engine

    @property
    def sequences(self) -> float:
        """That an engine can hold at once."""
        of_one = self.shape.kv_cache(2) * self.work.length
        return max(0.0, self.left * self.parallel / of_one)

    @property
    def compute(self) -> float:
        """Seconds: four models look at the rollout; policy and value learn from it, the policy from
        the pretraining text. Learning with checkpoints is four forward passes.
        """
        work = self.work
        rollout, text = work.episodes * work.length, work.episodes * work.ptx_tokens
        passes = 4 * rollout + 4 * (rollout + text) + 4 * rollout
        machine = self.machine
        return (
            passes
            * self.shape.forward(work.length)
            / (machine.gpus * machine.compute * machine.busy)
        )

    @property
    def generation(self) -> float:
        """Seconds: a step reads the engine's weights and its sequences' cache, on average half
        full of the response.
        """
        engines = self.machine.gpus / self.parallel
        running = min(self.work.episodes / engines, max(self.sequences, 1))
        waves = self.work.episodes / engines / running
        cached = self.work.prompt + self.work.response / 2
        read = self.shape.parameters * FROZEN + running * cached * self.shape.kv_cache(2)
        rate = self.parallel * self.machine.bandwidth * self.machine.reads
        return waves * self.work.response * read / rate

    @property
    def step_communication(self) -> float:
        """Bytes that a GPU receives in a minibatch step: bf16 weights gathered forward and backward
        and gradients scattered (arXiv 1910.02054, 7.2: three times the weights), for policy, ptx
        and value each.
        """
        share = 1 - 1 / self.machine.gpus
        return 3 * 3 * 2 * self.shape.parameters * share

    @property
    def communication(self) -> float:
        """Seconds an iteration, were nothing of it hidden: every minibatch step, four forward
        passes, and the weights to the engine.
        """
        steps = self.work.episodes / self.work.minibatch
        once = (4 + 1) * 2 * self.shape.parameters
        return (steps * self.step_communication + once) / self.machine.link

    @property
    def fits(self) -> bool:
        machine = self.machine
        room = machine.memory * machine.usable - self.state
        return room > self.activations and self.sequences >= 1


# Llama 2 (arXiv 2307.09288), whose smallest has as many key heads as heads.
SHAPES = {
    "7B": Shape(4096, 11008, 32, 32, 32, 128, 32000),
    "70B": Shape(8192, 28672, 80, 64, 8, 128, 32000),
}
PLANS = {
    f"{size} on {gpus}": Plan(shape, Machine(gpus), 1 if size == "7B" else 8)
    for size, shape in SHAPES.items()
    for gpus in (8, 64)
}


def gb(bytes_: float) -> str:
    return f"{bytes_ / 1e9:.1f}"


def table() -> str:
    """One column for each plan."""
    plans = list(PLANS.values())
    rows: dict[str, list[str]] = {
        "weights, billions": [f"{p.shape.parameters / 1e9:.2f}" for p in plans],
        "weights, gradients, Adam, average of four models, GB a GPU": [gb(p.state) for p in plans],
        "engine's weights, GB a GPU": [gb(p.engine) for p in plans],
        "activations of the largest pass, GB a GPU": [gb(p.activations) for p in plans],
        "left for the KV cache, GB a GPU": [gb(p.left) if p.left > 0 else "-" for p in plans],
        "KV cache, MB a token": [f"{p.shape.kv_cache(2) / 1e6:.2f}" for p in plans],
        "sequences at once in an engine": [f"{p.sequences:.0f}" for p in plans],
        "**fits**": ["yes" if p.fits else "**no**" for p in plans],
    }
    seconds = {
        "generation, s": [p.generation for p in plans],
        "forward and backward passes, s": [p.compute for p in plans],
        "communication, were none hidden, s": [p.communication for p in plans],
    }
    for name, values in seconds.items():
        rows[name] = [f"{v:.1f}" if p.fits else "-" for p, v in zip(plans, values, strict=True)]
    rows["communication of a minibatch step, GB a GPU"] = [gb(p.step_communication) for p in plans]
    hours = [(p.generation + p.compute + p.communication) * p.work.iterations / 3600 for p in plans]
    rows["256,000 episodes, hours"] = [
        f"{h:.0f}" if p.fits else "-" for p, h in zip(plans, hours, strict=True)
    ]
    lines = ["| | " + " | ".join(PLANS) + " |", "|---" * (len(plans) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table())
