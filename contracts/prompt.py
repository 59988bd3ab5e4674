"""How a prompt becomes the text that a model reads, the same in serving and in training."""

from typing import TypedDict

# For a tokenizer that brings no chat template of its own: each message on its own lines, nothing
# invented.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}"
)


class ChatMessage(TypedDict):
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str
