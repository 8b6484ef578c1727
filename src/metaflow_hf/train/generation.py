"""Text that a model continues a prompt with, or answers a conversation with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaflow_hf.config import ModelConfig
from metaflow_hf.errors import ConfigError
from metaflow_hf.train.models import known_positions, load_model, load_tokenizer
from metaflow_hf.train.special_tokens import aligned_special_tokens

Messages = Sequence[Mapping[str, Any]]


def generate(
    model: nn.Module | Path | str,
    prompts: Sequence[str | Messages],
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    seed: int = 0,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> list[str]:
    """Generate the continuation of each prompt, without the prompt; the same seed gives the same texts.

    A prompt is tokenized as in training: it begins with one beginning-of-text token where the tokenizer adds one, and has
    no end-of-text token after it. A list of messages is rendered by the chat template, with the assistant's turn opened.
    A text ends with the tokens that training ends texts with, and at the latest with the positions that the model knows;
    of a prompt that leaves too little room the end is continued. An empty prompt begins a new document.

    Args:
        model: A model, or a directory of one, which then may bring the tokenizer.
        prompts: Texts, or conversations as lists of messages (``role``, ``content``).
        tokenizer: Required for a model that is given as an object.
        max_new_tokens: At most so many tokens of each text.
        temperature: 0 takes the most likely token each time.
        seed: That of the first prompt; the next one has the next.
        device: Of a model that is loaded from a directory; by default the first GPU, else the CPU.
        allow_pickle: Load weights that are stored as pickle.
        trust_remote_code: Run Python code of the directory.

    Raises:
        UnsupportedModelError: The directory holds no causal language model.
        ConfigError: There is no tokenizer, or no chat template for a conversation.

    """
    if isinstance(model, (str, Path)):
        settings = ModelConfig(
            repo_id=str(Path(model).resolve()), allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
        )
        tokenizer = tokenizer or load_tokenizer(Path(model), trust_remote_code=trust_remote_code)
        model = load_model(Path(model), settings)
        model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if tokenizer is None:
        raise ConfigError("generate needs the tokenizer of a model that is given as an object.")
    was_training = model.training
    model.eval()
    try:
        return [
            _continue(model, tokenizer, prompt, max_new_tokens, temperature, seed + number)
            for number, prompt in enumerate(prompts)
        ]
    finally:
        model.train(was_training)


def prompt_tokens(prompt: str | Messages, tokenizer: Any) -> list[int]:
    """The tokens that a prompt is sent as. Raises ``ConfigError``, see ``generate``."""
    if not isinstance(prompt, str):
        return _chat_tokens(prompt, tokenizer)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids: list[int] = list(tokenizer(prompt, verbose=False)["input_ids"]) if prompt else []
    # A text that was rendered for this model brings its beginning along.
    while begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]
    # Some tokenizers end each text; what ended already is not continued.
    if end is not None and ids and ids[-1] == end and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    if ids:
        return ids
    start = begin if begin is not None else end
    if start is None:
        raise ConfigError("an empty prompt needs a tokenizer with a token that begins or ends a text.")
    return [start]


def _chat_tokens(messages: Messages, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "a prompt of messages needs a tokenizer with a chat template, and this one has none: give a text."
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"the model's chat template refuses the messages of a prompt: {error}.") from error
    # The template writes the beginning itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _continue(
    model: Any, tokenizer: Any, prompt: str | Messages, max_new_tokens: int, temperature: float, seed: int
) -> str:
    device = next(model.parameters()).device
    ids = prompt_tokens(prompt, tokenizer)
    positions = known_positions(model)
    if positions is not None:
        ids = ids[-max(positions - max_new_tokens, positions // 2, 1) :]
        max_new_tokens = max(min(max_new_tokens, positions - len(ids)), 1)
    inputs = torch.tensor([ids], device=device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    config = model.config.get_text_config(decoder=True)
    special = aligned_special_tokens(config, getattr(model, "generation_config", None), tokenizer)
    pad = special.pad_id if special.pad_id is not None else next(iter(special.end_ids), None)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            eos_token_id=special.eos_token_id,
            pad_token_id=pad,
            **sampling,
        )
    text: str = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text
