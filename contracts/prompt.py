"""How a prompt becomes the text that a model reads, the same in serving and in training."""

from typing import TypedDict

# For a tokenizer that brings no chat template of its own: each message on its own lines, nothing
# invented.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}"
)

# Where Hugging Face keeps what turns text into tokens and back. A release has the same of these
# files as its parent, byte for byte; where the parent has none, it has none.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class ChatMessage(TypedDict):
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str
