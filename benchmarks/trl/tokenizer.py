"""A tokenizer for trainers that ask for one; the data is tokenised already."""

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.workloads import EOS, PAD, VOCAB


def tokenizer() -> PreTrainedTokenizerFast:
    names = {EOS: "<|endoftext|>", PAD: "<|pad|>"}
    words = {names.get(i, f"w{i}"): i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),  # noqa: S106
        bos_token=names[EOS],
        eos_token=names[EOS],
        pad_token=names[PAD],
    )
