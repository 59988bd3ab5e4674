"""TRL's SFTTrainer, packed, on texts tokenised beforehand; every token is trained on."""

import tempfile

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from benchmarks import workloads
from benchmarks.trl.stopwatch import Stopwatch
from benchmarks.trl.tokenizer import tokenizer
from benchmarks.trl.worker import Clock, serve


def run(
    shape: str, texts: int, width: int, rows: int, bf16: bool, micro: int
) -> tuple[Clock, dict[str, float]]:
    """One epoch; `rows` rows of `width` tokens an optimizer step, `micro` rows a pass."""
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            workloads.causal(shape, seed=0),
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=rows // micro,
                num_train_epochs=1,
                learning_rate=1e-5,
                lr_scheduler_type="constant",
                bf16=bf16,
                gradient_checkpointing=False,
                max_grad_norm=1.0,
                packing=True,
                max_length=width,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"input_ids": t} for t in workloads.documents(texts)]),
            processing_class=tokenizer(),
            callbacks=[stopwatch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    figures = {"loss": stopwatch.losses[-1], "steps": float(trainer.state.global_step)}
    return stopwatch.clock, figures


if __name__ == "__main__":
    disable_progress_bars()
    serve(run)
