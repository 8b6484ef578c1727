"""Small repositories under well-known names, for tests and for trying things offline.

Everything is tiny, untrained, and made when it is first asked for. Who may do what:

- ``READER`` was granted the gated repositories, ``STRANGER`` was not;
- ``OWNER`` may see and write everything in the namespace ``acme``;
- any other token is rejected, as on the real hub (or, by choice, counts as none).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from metaflow_hf.demo import fixture_models, tiny_models, tiny_tokenizers
from metaflow_hf.demo.catalog import add_defaults
from metaflow_hf.demo.content import HubContent, Repository
from metaflow_hf.demo.fixture_datasets import add_datasets
from metaflow_hf.demo.pickle_weights import pickle_file

READER, STRANGER, OWNER = "hf_reader", "hf_stranger", "hf_owner"
GATED_ID = "acme/gated-model"
PRIVATE_ID = "acme/private-model"
RENAMED_FROM, RENAMED_TO = "acme/old-name", "acme/new-name"
PICKLE_ONLY_ID = "facebook/opt-350m"
PULL_REQUEST_ID = "bigcode/starcoder"
TAGGED_ID = "gpt2"  # has the tag v1.0, the branch dev, and two commits on main

_VOCAB_SIZE = 512
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A model is trained on many examples, and each example is read once.",
    "Weights are numbers; a hub keeps them, and a cache keeps them near.",
    "Hello world, this is a small text for a small tokenizer.",
    "def train(model, data):\n    for batch in data:\n        model.step(batch)\n",
)
_GITATTRIBUTES = (
    b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"
)

Weights = Mapping[str, Any]
Build = Callable[[], dict[str, bytes]]


def fixture_content(*, reject_unknown_tokens: bool = True) -> HubContent:
    """The default content, and the repositories of this module and of `metaflow_hf.demo.fixture_datasets`."""
    content = HubContent(reject_unknown_tokens=reject_unknown_tokens)
    add_defaults(content)
    content.add_user(READER, "reader", granted=(GATED_ID,))
    content.add_user(STRANGER, "stranger")
    content.add_user(OWNER, "owner", namespaces=("acme",))
    _add_models(content)
    _add_restricted_models(content)
    add_datasets(content)
    return content


def _add_models(content: HubContent) -> None:
    models: tuple[tuple[str, Build, str], ...] = (
        ("bigcode/starcoder", _starcoder, "gpt_bigcode"),
        ("microsoft/phi-2", _phi, "phi"),
        ("facebook/opt-350m", _opt, "opt"),
        (
            "meta-llama/Llama-2-70b-hf",
            functools.partial(_llama, 6, hidden_size=256, num_shards=6),
            "llama",
        ),
        (
            "meta-llama/Llama-2-13b-hf",
            functools.partial(_llama, 5, hidden_size=96, num_shards=4),
            "llama",
        ),
        ("meta-llama/Llama-2-7b-hf", functools.partial(_llama, 4, hidden_size=64, num_shards=2), "llama"),
        ("distilbert-base-uncased", _distilbert, "distilbert"),
        ("gpt2", _gpt2, "gpt2"),
        ("bert-base-uncased", _bert, "bert"),
    )
    for popularity, (repo_id, build, architecture) in enumerate(models, start=1):
        content.add(
            repo_id,
            functools.partial(_with_readme, repo_id, build),
            tags=("transformers", "untrained", architecture),
            downloads=100 * popularity,
            then={TAGGED_ID: _second_commit, PULL_REQUEST_ID: _pull_request}.get(repo_id),
        )


def _add_restricted_models(content: HubContent) -> None:
    content.add(GATED_ID, functools.partial(_with_readme, GATED_ID, _gpt2), gated=True)
    content.add(PRIVATE_ID, functools.partial(_with_readme, PRIVATE_ID, _gpt2), private=True)
    content.add(RENAMED_FROM, functools.partial(_with_readme, RENAMED_FROM, _gpt2))
    content.rename(RENAMED_FROM, RENAMED_TO)


def _second_commit(repo: Repository) -> None:
    repo.tag("v1.0")
    repo.branch("dev")
    repo.commit({"ON_DEV.md": b"only on dev\n"}, branch="dev", message="a branch of its own")
    repo.commit({"README.md": _readme(repo.repo_id) + b"\nRevised.\n"}, message="revise the README")


def _pull_request(repo: Repository) -> None:
    repo.commit(
        {"README.md": _readme(repo.repo_id) + b"\nProposed.\n"}, branch="refs/pr/42", message="a proposal"
    )


def _readme(repo_id: str) -> bytes:
    header = "---\nlicense: apache-2.0\nlibrary_name: transformers\ntags:\n- untrained\n---\n"
    return f"{header}# {repo_id}\n\nA tiny, untrained stand-in for tests.\n".encode()


def _with_readme(repo_id: str, build: Build) -> dict[str, bytes]:
    return {"README.md": _readme(repo_id), ".gitattributes": _GITATTRIBUTES, **build()}


def texts() -> list[str]:
    """What the tokenizers of these models are trained on."""
    return [*_SENTENCES, *(f"{s} {t}" for s in _SENTENCES for t in _SENTENCES)]


@functools.cache
def _bpe() -> dict[str, bytes]:
    return tiny_tokenizers.byte_level_bpe(texts(), _VOCAB_SIZE)


def _single_file(config: dict[str, Any], weights: Weights) -> dict[str, bytes]:
    return {
        "config.json": tiny_models.config_file(config),
        "model.safetensors": tiny_models.safetensors_file(dict(weights)),
    }


def _bert() -> dict[str, bytes]:
    files = tiny_tokenizers.wordpiece(texts(), 2000)
    config = fixture_models.bert_config(vocab_size=files["vocab.txt"].count(b"\n"), hidden_size=128)
    model = _single_file(config, fixture_models.bert_weights(config, seed=1))
    return {**files, **model, "LICENSE": b"Apache License, Version 2.0\n"}


def _distilbert() -> dict[str, bytes]:
    files = tiny_tokenizers.wordpiece(texts(), 2000)
    config = fixture_models.distilbert_config(vocab_size=files["vocab.txt"].count(b"\n"))
    return {**files, **_single_file(config, fixture_models.distilbert_weights(config, seed=3))}


def _gpt2() -> dict[str, bytes]:
    config = fixture_models.gpt2_config(vocab_size=_VOCAB_SIZE)
    return {
        **_bpe(),
        **tiny_tokenizers.vocab_and_merges(_bpe()["tokenizer.json"]),
        **tiny_tokenizers.bpe_config(config["n_positions"]),
        **_single_file(config, fixture_models.gpt2_weights(config, seed=2)),
    }


def _llama(seed: int, *, hidden_size: int, num_shards: int) -> dict[str, bytes]:
    config = tiny_models.llama_config(
        vocab_size=_VOCAB_SIZE, hidden_size=hidden_size, intermediate_size=2 * hidden_size, max_positions=256
    )
    return {
        **_bpe(),
        **tiny_tokenizers.bpe_config(config["max_position_embeddings"]),
        "config.json": tiny_models.config_file(config),
        **tiny_models.sharded_files(tiny_models.llama_weights(config, seed), num_shards),
    }


def _opt() -> dict[str, bytes]:
    """A model whose only weights are a pickle."""
    config = fixture_models.opt_config(vocab_size=_VOCAB_SIZE)
    return {
        **_bpe(),
        **tiny_tokenizers.bpe_config(config["max_position_embeddings"]),
        "config.json": tiny_models.config_file(config),
        "pytorch_model.bin": pickle_file(fixture_models.opt_weights(config, seed=7)),
    }


def _phi() -> dict[str, bytes]:
    config = fixture_models.phi_config(vocab_size=_VOCAB_SIZE)
    return {
        **_bpe(),
        **tiny_tokenizers.bpe_config(config["max_position_embeddings"]),
        "config.json": tiny_models.config_file(config),
        **tiny_models.sharded_files(fixture_models.phi_weights(config, seed=8), 2),
    }


def _starcoder() -> dict[str, bytes]:
    config = fixture_models.gpt_bigcode_config(vocab_size=_VOCAB_SIZE)
    return {
        **_bpe(),
        **tiny_tokenizers.bpe_config(config["n_positions"]),
        **_single_file(config, fixture_models.gpt_bigcode_weights(config, seed=9)),
    }
