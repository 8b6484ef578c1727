"""Kinds of datasets that are not trained as they are, recognized by their columns."""

from typing import Any, Final

from metaflow_hf.data.formats.advice import guesses, question_column
from metaflow_hf.data.formats.columns import (
    EMPTY,
    MEDIA,
    MESSAGES,
    TEXT,
    TRANSLATIONS,
    Columns,
    parsed_list,
)
from metaflow_hf.data.formats.examples import ASSISTANT

_VERDICTS: Final = frozenset({"truth values", "numbers", EMPTY})

_MEDIA_NAMES: Final = frozenset(
    {
        "image",
        "images",
        "audio",
        "audios",
        "video",
        "videos",
        "pixel_values",
        "jpg",
        "jpeg",
        "png",
        "wav",
        "mp3",
        "mp4",
    }
)


def refused_kind(columns: Columns, *, has_text: bool) -> str | None:
    """Which kind of dataset this is, with what to do instead; ``None`` for one that may be trained.

    Images, audio and video beside a text or a conversation (``has_text``) are columns that are left out.
    """
    if {"chosen", "rejected"} <= columns.keys():
        return (
            "This is preference data (columns 'chosen' and 'rejected'), which supervised training does not use. To "
            f"train only on the chosen answers, set data.columns: {_chosen(columns)}."
        )
    label = columns.get("label")
    if label is not None and {"prompt", "completion"} <= columns.keys() and label.kind in _VERDICTS:
        return (
            "This is unpaired preference data (column 'label' says whether a completion is good), which supervised "
            "training does not use. Keep the rows whose label is true, without the column 'label'; or set data.columns: "
            "{prompt: prompt, completion: completion} to train all of them."
        )
    if {"prompt", "completions", "labels"} <= columns.keys():
        return "This is data for stepwise supervision (columns 'completions' and 'labels'), which is not supported."
    for column in columns.values():
        if column.kind == TRANSLATIONS:
            languages = ", ".join(column.example)
            return (
                f"This is translation data: column {column.name!r} holds one text per language ({languages}). Write the "
                "two texts into columns of their own, and name them: data.columns: {prompt: …, completion: …}."
            )
        is_media = column.kind == MEDIA or (column.name.lower() in _MEDIA_NAMES and column.kind != EMPTY)
        if is_media and not has_text:
            return (
                f"This is a dataset of images, audio or video (column {column.name!r}), of which only text can be trained"
                f"{_beside(column.name, columns)}."
            )
    return None


def _chosen(columns: Columns) -> str:
    """The columns of the chosen answers, by what they hold: whole conversations, or answers to a prompt."""
    chosen = columns["chosen"]
    prompt = question_column(columns) or ("prompt" if "prompt" in columns else None)
    is_answer = chosen.kind == TEXT or (chosen.kind == MESSAGES and _begins_with_answer(chosen.example))
    if is_answer and prompt is not None:
        return f"{{prompt: {prompt}, completion: chosen}}"
    return "{text: chosen}" if chosen.kind == TEXT else "{messages: chosen}"


def _begins_with_answer(messages: Any) -> bool:
    return bool(parsed_list(messages)[0]["role"] == ASSISTANT)


def _beside(media: str, columns: Columns) -> str:
    """How to train the text beside images."""
    others = {name: column for name, column in columns.items() if name != media}
    settings = [
        f"{{{', '.join(f'{role}: {column}' for role, column in mapping.items())}}}"
        for _, mapping in guesses(others)
    ]
    return f": set data.columns: {' or '.join(settings)} for the text beside them" if settings else ""
