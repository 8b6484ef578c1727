"""Rows -> documents of tokens with labels, the same on every machine."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from metaflow_hf.data.chat import Conversation, Transcript, transcribe
from metaflow_hf.errors import BadRowError

logger = logging.getLogger("metaflow_hf.data")

IGNORE_INDEX: Final = -100

LossOn = Literal["assistant", "all"]


@dataclass(frozen=True, slots=True)
class Document:
    """The tokens of one row; ``labels`` has the length of ``input_ids``."""

    input_ids: Sequence[int]
    labels: Sequence[int]

    def cut(self, start: int, stop: int) -> "Document":
        """Tokens ``[start, stop)`` of it."""
        return Document(self.input_ids[start:stop], self.labels[start:stop])


def encode_rows(
    rows: Sequence[Mapping[str, Any] | str],
    tokenizer: Any,
    *,
    text_column: str = "text",
    loss_on: LossOn = "assistant",
    on_bad_row: Literal["raise", "skip"] = "raise",
    name_row: Callable[[int], str] = "row {}".format,
) -> list[Document]:
    """One document per row with text, in order; rows without text give none.

    ``tokenizer`` is a transformers tokenizer. It adds to a text what it adds by default (one beginning, also where
    the text brings its own), and special tokens that are spelled out in a text become these tokens. A row whose
    ``text_column`` holds a list is a conversation: the chat template is applied, with the tools in the row's column
    ``tools`` if there is one, and with ``loss_on="assistant"`` only what the assistant says (with the template's own
    end of turn) carries labels.

    Raises ``BadRowError`` for a value that is neither text nor a conversation that the template takes, named by
    ``name_row(index)``; with ``on_bad_row="skip"`` such rows give no document and are logged.
    """
    items: list[str | Transcript] = []
    for number, row in enumerate(rows):
        try:
            item = readable(row, tokenizer, text_column=text_column, loss_on=loss_on, name=name_row(number))
        except BadRowError as error:
            if on_bad_row == "raise":
                raise
            logger.warning(f"left out of training: {error}")
            continue
        if item is not None:
            items.append(item)
    return encode(items, tokenizer, loss_on=loss_on)


def readable(
    row: Mapping[str, Any] | str, tokenizer: Any, *, text_column: str, loss_on: LossOn, name: str
) -> str | Transcript | None:
    """The text of a row, its conversation as the template renders it, or ``None`` without either."""
    value = row if isinstance(row, str) else row.get(text_column)
    if not value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        conversation = Conversation.of_row(value, {} if isinstance(row, str) else row)
        return transcribe(conversation, tokenizer, find_spoken=loss_on == "assistant", row=name)
    raise BadRowError(
        f"{name}: column {text_column!r} holds {type(value).__name__}, expected text or a list of messages."
    )


def encode(items: Sequence[str | Transcript], tokenizer: Any, *, loss_on: LossOn) -> list[Document]:
    """The tokens of texts and of rendered conversations, in order."""
    # In batches, because fast tokenizers work on those in parallel.
    texts = iter(_encode_texts([item for item in items if isinstance(item, str)], tokenizer))
    chats = iter(_encode_chats([item for item in items if not isinstance(item, str)], tokenizer, loss_on))
    return [next(texts) if isinstance(item, str) else next(chats) for item in items]


def _encode_texts(texts: Sequence[str], tokenizer: Any) -> list[Document]:
    if not texts:
        return []
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    begin, spelled = tokenizer.bos_token_id, tokenizer.bos_token
    documents = []
    for text, ids in zip(texts, encoded, strict=True):
        # A text that was rendered for this model brings its beginning along.
        twice = begin is not None and ids[:2] == [begin, begin] and not text.startswith(spelled * 2)
        kept = ids[1:] if twice else ids
        documents.append(Document(kept, kept))
    return documents


def _encode_chats(chats: Sequence[Transcript], tokenizer: Any, loss_on: LossOn) -> list[Document]:
    if not chats:
        return []
    some = loss_on == "assistant"
    encoded = tokenizer(
        [chat.text for chat in chats], add_special_tokens=False, return_offsets_mapping=some, verbose=False
    )
    if not some:
        return [Document(ids, ids) for ids in encoded["input_ids"]]
    return [
        Document(
            ids,
            [
                token if chat.is_spoken(*place) else IGNORE_INDEX
                for token, place in zip(ids, places, strict=True)
            ],
        )
        for chat, ids, places in zip(chats, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def end_document(document: Document, eos_token_id: int | None) -> Document:
    """The document with the token that ends it, unless it has it already (or there is none).

    In a conversation that token carries loss only if what is before it does.
    """
    if eos_token_id is None or document.input_ids[-1] == eos_token_id:
        return document
    label = eos_token_id if document.labels[-1] != IGNORE_INDEX else IGNORE_INDEX
    return Document([*document.input_ids, eos_token_id], [*document.labels, label])
