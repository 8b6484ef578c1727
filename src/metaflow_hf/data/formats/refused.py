"""Kinds of datasets that are not trained as they are, recognized by their columns."""

from typing import Final

from metaflow_hf.data.formats.columns import EMPTY, MEDIA, TRANSLATIONS, Columns

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
            "train only on the chosen answers, name them: data.columns: {messages: chosen}, or {prompt: prompt, "
            "completion: chosen}."
        )
    if {"prompt", "completion", "label"} <= columns.keys() and columns["label"].kind in {
        "truth values",
        EMPTY,
    }:
        return (
            "This is unpaired preference data (column 'label' says whether a completion is good), which supervised "
            "training does not use. Keep the rows whose label is true, without the column 'label'."
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
                f"This is a dataset of images, audio or video (column {column.name!r}), of which only text can be "
                "trained. To train a column of text beside them, name it: data.columns: {text: …}."
            )
    return None
