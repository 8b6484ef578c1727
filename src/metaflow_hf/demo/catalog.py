"""What the embedded hub serves by default: one tiny model to train, one text dataset to train it on."""

import threading

from metaflow_hf.demo import corpus
from metaflow_hf.demo.content import HubContent

MODEL_ID = "metaflow-hf/tiny-llama"
DATASET_ID = "metaflow-hf/python-docs"
VOCAB_SIZE = 2048
WEIGHTS_SEED = 0
_TOKENIZER_ROWS_ONE_IN = 4  # a quarter of the text gives the same tokenizer quality to 1 %

_MODEL_README = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- untrained
---
# Tiny Llama, untrained

A Llama of a million parameters with freshly initialised weights, and a byte-level BPE of {VOCAB_SIZE:,} tokens
trained on [{DATASET_ID}](datasets/{DATASET_ID}). Made to be trained in minutes on a laptop.
"""


def demo_content() -> HubContent:
    """A hub with `MODEL_ID` and `DATASET_ID`. Costs nothing until somebody asks for one of them."""
    content = HubContent()
    add_defaults(content)
    return content


def add_defaults(content: HubContent) -> None:
    """Add `MODEL_ID` and `DATASET_ID` to a hub's content."""
    defaults = _Defaults()
    content.add(
        MODEL_ID,
        defaults.tiny_llama,
        tags=("transformers", "safetensors", "llama", "text-generation"),
        downloads=2,
    )
    content.add(
        DATASET_ID,
        defaults.python_docs,
        repo_type="dataset",
        tags=("language:en", "modality:text", "format:json", "task_categories:text-generation"),
        downloads=1,
    )


class _Defaults:
    """Builds both repositories from one reading of the corpus."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._corpus: corpus.Corpus | None = None

    def _read(self) -> corpus.Corpus:
        with self._lock:
            if self._corpus is None:
                self._corpus = corpus.python_docs()
            return self._corpus

    def python_docs(self) -> dict[str, bytes]:
        return corpus.dataset_files(self._read())

    def tiny_llama(self) -> dict[str, bytes]:
        from metaflow_hf.demo import tiny_models, tiny_tokenizers  # numpy: not needed to start the hub

        config = tiny_models.llama_config(vocab_size=VOCAB_SIZE)
        texts = (row.text for row in self._read().train[::_TOKENIZER_ROWS_ONE_IN])
        special_ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        weights = tiny_models.llama_weights(config, WEIGHTS_SEED)
        return {
            "README.md": _MODEL_README.encode(),
            "config.json": tiny_models.config_file(config),
            "generation_config.json": tiny_models.config_file(special_ids),
            "model.safetensors": tiny_models.safetensors_file(weights),
            **tiny_tokenizers.byte_level_bpe(texts, VOCAB_SIZE),
            **tiny_tokenizers.bpe_config(config["max_position_embeddings"]),
        }
