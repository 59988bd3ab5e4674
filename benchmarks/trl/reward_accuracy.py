"""TRL's RewardTrainer on pairs tokenised beforehand, as it ships but for what both sides share."""

import json
import tempfile
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    set_seed,
)
from trl import RewardConfig, RewardTrainer

from benchmarks.trl.stopwatch import Stopwatch
from benchmarks.trl.worker import Clock, serve


def run(
    base: str,
    pairs: str,
    folder: str,
    epochs: int,
    learning_rate: float,
    micro: int,
    accumulate: int,
    seed: int,
) -> tuple[Clock, dict[str, float]]:
    """Train on the rows of the JSON file `pairs`, starting from the policy in `base`, and save into
    `folder`; `micro` pairs a pass and `accumulate` passes a step.
    """
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RewardTrainer(
            model,
            args=RewardConfig(
                output_dir=scratch,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=accumulate,
                num_train_epochs=epochs,
                learning_rate=learning_rate,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=Dataset.from_list(json.loads(Path(pairs).read_text(encoding="utf-8"))),
            processing_class=AutoTokenizer.from_pretrained(base),
            callbacks=[stopwatch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.model.save_pretrained(folder)
    return stopwatch.clock, {"steps": float(trainer.state.global_step)}


if __name__ == "__main__":
    disable_progress_bars()
    serve(run)
