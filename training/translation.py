"""From the tokens of one tokenizer to those of another, through the text."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from training.data import PromptRow, encode_response, render
from training.packing import Packed, Tree


class Translation:
    """Prompts and responses of a policy as a reward model with another tokenizer was trained on
    them.
    """

    def __init__(
        self,
        source: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        rows: Iterable[PromptRow],
    ) -> None:
        self._source, self._target = source, target
        # A prompt is rendered anew, since it may pass through another chat template.
        self._prompts = {tuple(render(source, row)): render(target, row) for row in rows}

    def packed(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], finished: Sequence[bool]
    ) -> Packed:
        """Each prompt and response as one sequence in the target's tokens; a finished response ends
        with its end-of-text.
        """
        sequences = []
        for (prompt, response), done in zip(pairs, finished, strict=True):
            text = str(self._source.decode(list(response), skip_special_tokens=True))
            ids = encode_response(self._target, text, done) or [self._target.eos_token_id]
            sequences.append(Tree(self._prompts[tuple(prompt)] + ids))
        return Packed(sequences)


def alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both give a token the same id and a conversation the same form."""
    return one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template
