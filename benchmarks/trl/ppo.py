"""The update of TRL's last PPOTrainer on fixed episodes; what they were sampled with is given."""

import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import PrinterCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks import workloads
from benchmarks.trl.stopwatch import Stopwatch
from benchmarks.trl.tokenizer import tokenizer
from benchmarks.trl.worker import Clock, serve

LONGEST = 64


class Replay:
    """In place of generation: the known responses, and logits; `clock` is not the update's."""

    def __init__(self, episodes: list[workloads.Episode]) -> None:
        self._responses = {tuple(prompt): response for prompt, response in episodes}
        self.clock = Clock()

    @torch.no_grad()
    def __call__(
        self, model: torch.nn.Module, queries: Tensor, size: int, pad: int, config: object
    ) -> tuple[Tensor, Tensor]:
        self.clock.start()
        prompts = [tuple(t for t in row if t != pad) for row in queries.tolist()]
        answers = [self._responses[prompt] for prompt in prompts]
        padded = torch.tensor([(a + [pad] * LONGEST)[:LONGEST] for a in answers])
        whole = torch.cat([queries, padded], 1)
        width = queries.shape[1]
        logits = [
            ppo_trainer.forward(model, part, pad).logits[:, width - 1 : -1].clone()
            for part in whole.split(8)
        ]
        self.clock.stop()
        return whole, torch.cat(logits)


def run(
    shape: str, episodes: int, minibatches: int, beta: float, micro: int
) -> tuple[Clock, dict[str, float]]:
    """One epoch over `episodes` in float32, as the trainer ships; `micro` episodes a pass."""
    data = workloads.episodes(episodes)
    replay, stopwatch = Replay(data), Stopwatch()
    ppo_trainer.batch_generation = replay
    names = tokenizer()
    names.padding_side = "left"
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=episodes // micro,
                local_rollout_forward_batch_size=micro,
                num_mini_batches=minibatches,
                num_ppo_epochs=1,
                total_episodes=episodes,
                response_length=LONGEST,
                kl_coef=beta,
                temperature=1.0,
                learning_rate=1e-5,
                stop_token="eos",  # noqa: S106
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                num_sample_generations=0,
                disable_tqdm=True,
            ),
            processing_class=names,
            model=workloads.causal(shape, seed=0),
            ref_model=workloads.causal(shape, seed=1),
            value_model=workloads.scorer(shape, seed=2),
            reward_model=workloads.scorer(shape, seed=3),
            train_dataset=Dataset.from_list([{"input_ids": prompt} for prompt, _ in data]),
            callbacks=[stopwatch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = stopwatch.logs
    figures = {"kl": logs["objective/kl"], "score": logs["objective/scores"]}
    return stopwatch.clock.without(replay.clock), figures


if __name__ == "__main__":
    disable_progress_bars()
    serve(run)
