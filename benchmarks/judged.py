"""A sampler that notes how good the answers were, by a judge from whom nobody learns."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from training.data import PromptRow, render_all
from training.evaluation.comparison import Judge
from training.model import load_tokenizer
from training.rollout import Sampled, Sampler


class Judged(Sampler):
    """`means` has the judge's mean score of each batch so far, `seconds` the CPU time of
    sampling.
    """

    def __init__(
        self, folder: Path, max_tokens: int, rows: Sequence[PromptRow], judge: Judge
    ) -> None:
        """`rows` are all that it will be asked for."""
        super().__init__(folder, max_tokens)
        self._tokenizer, self._judge = load_tokenizer(folder), judge
        rendered = map(tuple, render_all(self._tokenizer, rows))
        self._rows = dict(zip(rendered, rows, strict=True))
        self.means: list[float] = []
        self.seconds = 0.0

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        seed: int | Sequence[int],
        samples: int = 1,
    ) -> list[list[Sampled]]:
        started = time.process_time()
        found = super().sample(prompts, max_tokens, seed, samples)
        self.seconds += time.process_time() - started
        asked = [self._rows[tuple(p)] for p in prompts for _ in range(samples)]
        flat = [sampled for group in found for sampled in group]
        scores = self._judge(asked, [self.text(s) for s in flat], [s.finished for s in flat])
        self.means.append(mean(scores))
        return found

    def answers(
        self, rows: Sequence[PromptRow], max_tokens: int, seed: int, samples: int
    ) -> list[list[tuple[str, bool]]]:
        """`samples` answers to each of `rows` as text, and whether each came to its end."""
        found = self.sample(render_all(self._tokenizer, rows), max_tokens, seed, samples)
        return [[(self.text(s), s.finished) for s in group] for group in found]

    def text(self, sampled: Sampled) -> str:
        return str(self._tokenizer.decode(list(sampled.token_ids), skip_special_tokens=True))
