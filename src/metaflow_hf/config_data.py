"""The data section of a training configuration: which datasets, how their rows are read, and how they become batches."""

import datetime as dt
from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from metaflow_hf.config_sections import PositiveFloat, PositiveInt, Section


class DatasetConfig(Section):
    """One dataset of a mixture.

    ``weight`` is its share of the samples, relative to the weights of the other datasets. Without weights each dataset
    is trained as a whole: its first ``max_samples`` rows, ``epochs`` times (default ``data.epochs``). ``name`` is for
    reports; default is the name of the repository or file. ``format``, ``columns`` and ``text_column`` are as in
    ``data``.
    """

    dataset: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)] | None = None
    format: str = "auto"
    columns: dict[str, str] = Field(default={})
    text_column: str | None = None
    weight: PositiveFloat | None = None
    max_samples: PositiveInt | None = None
    epochs: PositiveInt | None = None

    @property
    def unpinned(self) -> str:
        """The dataset without the revision of a repository."""
        return self.dataset.partition("@")[0] if self.dataset.startswith("hf://") else self.dataset

    @property
    def title(self) -> str:
        """The name in reports."""
        if self.name is not None:
            return self.name
        if self.dataset.startswith("hf://"):
            return self.unpinned.removeprefix("hf://")
        return self.dataset.rstrip("/").rpartition("/")[2] or self.dataset

    @pydantic.model_validator(mode="after")
    def _one_naming(self) -> Self:
        if self.text_column is not None and self.columns:
            raise ValueError("text_column and columns both say which columns are trained: keep one of them")
        return self


class DataConfig(Section):
    """Which texts are trained, and how they become batches; ``dataset`` may come from a flow's parameter instead.

    ``datasets`` trains a mixture of several datasets in place of ``dataset``; ``format``, ``columns`` and
    ``text_column`` then describe the ``evaluation_dataset``.
    ``evaluation_dataset`` is held out for the evaluation: rows that say the same as one that is measured are not trained.
    Without one about ``heldout_samples`` rows are held out (``auto``: 256, but at most one in ten; always at least one in
    a thousand), chosen by the hash of what they say, so that copies of a row are on the same side.
    ``documents: whole`` makes each document one row, ``pages`` each page of a PDF.
    ``sequence_length`` is in tokens, ``batch_size`` in sequences. ``packing: isolated`` keeps the documents of one
    sequence from seeing each other; ``long_documents`` says what becomes of those longer than a sequence;
    ``loss_on`` says whose words are learned: answers (turns of the assistant, completions, outputs), or everything.
    ``format`` is that of the rows, ``columns`` names the column of each of its roles, ``text_column`` that of a format
    with one. ``chat_template`` (Jinja, a file, a directory with a tokenizer, or a name) replaces that of the tokenizer,
    ``template_date`` (YYYY-MM-DD) is the date that templates print; default is the day on which the lineage began.
    ``keep_columns`` names the columns that are stored beside those that are trained; without it all that JSON can hold are.
    """

    dataset: str | None = None
    datasets: list[DatasetConfig] = Field(default=[])
    format: str = "auto"
    columns: dict[str, str] = Field(default={})
    text_column: str | None = None
    chat_template: str | None = None
    template_date: str | None = None
    evaluation_dataset: str | None = None
    heldout_samples: PositiveInt | Literal["auto"] = "auto"
    samples_per_block: PositiveInt = 100_000
    dataset_chunk_size: PositiveInt | Literal["auto"] = "auto"
    sequence_length: Annotated[int, Field(ge=2)] = 1024
    batch_size: PositiveInt = 8
    packing: bool | Literal["isolated"] = True
    long_documents: Literal["split", "truncate", "drop"] = "split"
    loss_on: Literal["assistant", "all"] = "assistant"
    shuffle: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    epochs: PositiveInt = 1
    max_samples: PositiveInt | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    documents: Literal["whole", "pages"] = "whole"
    keep_columns: list[str] | None = None

    @pydantic.field_validator("template_date")
    @classmethod
    def _date(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                dt.date.fromisoformat(value)
            except ValueError as error:
                raise ValueError("must be a date like 2026-01-31") from error
        return value

    @pydantic.model_validator(mode="after")
    def _one_naming(self) -> Self:
        if self.text_column is not None and self.columns:
            raise ValueError("text_column and columns both say which columns are trained: keep one of them")
        return self

    @pydantic.field_validator("datasets")
    @classmethod
    def _mixture(cls, value: list[DatasetConfig]) -> list[DatasetConfig]:
        if missing := [f"data.datasets[{i}]" for i, one in enumerate(value) if one.weight is None]:
            weighted = len(value) - len(missing)
            if weighted:
                raise ValueError(
                    f"{weighted} of {len(value)} datasets have a weight, but {', '.join(missing)} has none: give all "
                    "of them a weight, or none"
                )
        for what, names in (
            ("dataset", [one.unpinned for one in value]),
            ("name", [one.title for one in value]),
        ):
            for number, name in enumerate(names):
                if (first := names.index(name)) < number:
                    remedy = (
                        "train it more often by a larger epochs or weight"
                        if what == "dataset"
                        else "set another name"
                    )
                    raise ValueError(
                        f"data.datasets[{number}] has the same {what} as data.datasets[{first}], {name!r}: {remedy}"
                    )
        return value

    @pydantic.model_validator(mode="after")
    def _dataset_or_mixture(self) -> Self:
        if not self.datasets:
            return self
        if self.dataset is not None:
            raise ValueError("dataset and datasets both say what is trained: keep one of them")
        if self.max_samples is not None:
            raise ValueError("max_samples limits one dataset: set it in an item of datasets")
        named = [name for name in ("format", "columns", "text_column") if name in self.model_fields_set]
        named = [name for name in named if getattr(self, name) != type(self).model_fields[name].default]
        if named and self.evaluation_dataset is None:
            raise ValueError(f"{named[0]} describes the rows of one dataset: set it in an item of datasets")
        return self

    @property
    def title(self) -> str:
        """What people call the data that is trained; "" when nothing says."""
        return self.dataset or ", ".join(one.title for one in self.datasets)

    def only(self, number: int) -> "DataConfig":
        """The settings of dataset ``number`` of a mixture, as if it were trained alone."""
        one = self.datasets[number]
        return self.model_copy(
            update={
                "dataset": one.dataset,
                "datasets": [],
                "format": one.format,
                "columns": one.columns,
                "text_column": one.text_column,
                "max_samples": one.max_samples,
                "epochs": one.epochs or self.epochs,
            }
        )
