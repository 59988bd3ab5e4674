"""TRL's RewardTrainer on every pair of a ranking, tokenised beforehand: loss of the first step."""

import tempfile
from itertools import combinations

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from trl import RewardConfig, RewardTrainer

from benchmarks import workloads
from benchmarks.trl.stopwatch import Stopwatch
from benchmarks.trl.tokenizer import tokenizer
from benchmarks.trl.worker import Clock, serve


def run(
    shape: str, k: int, prompts: int, step: int, bf16: bool, micro: int
) -> tuple[Clock, dict[str, float]]:
    """One epoch; `step` prompts an optimizer step, `micro` pairs a pass."""
    pairs = k * (k - 1) // 2
    rows = [
        {"chosen_ids": prompt + answers[i], "rejected_ids": prompt + answers[j]}
        for prompt, answers in workloads.rankings(k, prompts)
        for i, j in combinations(range(k), 2)
    ]
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            workloads.scorer(shape, seed=0),
            args=RewardConfig(
                output_dir=folder,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=step * pairs // micro,
                num_train_epochs=1,
                learning_rate=1e-5,
                lr_scheduler_type="constant",
                bf16=bf16,
                gradient_checkpointing=False,
                max_grad_norm=1.0,
                max_length=None,
                train_sampling_strategy="sequential",
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=[stopwatch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return stopwatch.clock, {"loss": stopwatch.losses[0]}


if __name__ == "__main__":
    disable_progress_bars()
    serve(run)
