"""What a person agrees to: the current notice, word for word. Another text is a new version."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    version: str
    text: str


CURRENT = Notice(
    version="1",
    text=(
        "If you agree, we keep the prompts that you send, the answers that you get and the "
        "rankings that you give, together with your user id. We use them to train and to test the "
        "model that answers here. People who work on the model may read them. Do not send what "
        "should not be read by others.\n\n"
        "If you do not agree, you can use everything except ranking, and none of your prompts is "
        "kept. Requests with a production key are never kept, whatever you choose.\n\n"
        "You can withdraw at any time, here or with PUT /v1/consent. Then nothing more is kept, "
        "and the next training data leaves out all that you gave before, even if you agree again "
        "later. A model that was trained before your withdrawal stays as it is until the next one "
        "replaces it."
    ),
)
