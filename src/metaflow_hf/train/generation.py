"""Text that a model continues a prompt with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaflow_hf.config import ModelConfig
from metaflow_hf.errors import ConfigError
from metaflow_hf.train.models import known_positions, load_model, load_tokenizer


def generate(
    model: nn.Module | Path | str,
    prompts: Sequence[str],
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    seed: int = 0,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> list[str]:
    """The continuation of each prompt, without the prompt; the same seed gives the same texts.

    ``model`` is a model or a directory of one, which then may bring the tokenizer; ``temperature`` 0 takes the most
    likely token each time. An empty prompt begins a new document. A text ends at the latest with the positions that the
    model knows; of a prompt that leaves too little room its end is what is continued. Raises ``UnsupportedModelError``, and
    ``ConfigError`` for a model without tokenizer.
    """
    if isinstance(model, (str, Path)):
        settings = ModelConfig(allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
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


def _continue(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> str:
    device = next(model.parameters()).device
    ids = tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not ids:
        if start is None:
            raise ConfigError("an empty prompt needs a tokenizer with a token that begins or ends a text.")
        ids = [start]
    positions = known_positions(model)
    if positions is not None:
        ids = ids[-max(positions - max_new_tokens, positions // 2, 1) :]
        max_new_tokens = max(min(max_new_tokens, positions - len(ids)), 1)
    inputs = torch.tensor([ids], device=device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            **sampling,
        )
    text: str = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text
