"""Where the turns of some stock templates begin, so that labels equal those of TRL's training templates.

A turn begins behind the prompt for it. TRL's ``*_training.jinja`` files set ``{% generation %}`` marks before the last
part of that prompt in a few templates, which are known here by the SHA-256 of their text. The tokens in between are
always given at inference, so that it makes no difference to what a model says, but the loss is comparable.
"""

import hashlib
from functools import lru_cache
from typing import Final

THOUGHT: Final = "<think>"

# The parts of the prompt that belong to the turn, by the digest of the template.
_HEADERS: Final[dict[str, tuple[str, ...]]] = {
    # deepseekv3
    "563b1ce7d61d50a9b4c7439a912a1116f095b712df5b5e4d3e1116049874eb64": (
        "<｜Assistant｜>",
        "<｜tool▁outputs▁end｜>",
    ),
    # deepseek_r1_distill
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": (
        "<｜Assistant｜>",
        "<｜tool▁outputs▁end｜>",
    ),
    # gptoss
    "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146": ("<|start|>assistant",),
    # muse_glimmer
    "6cd0e94d9b489fdb9a000743791f20e7e52b62c1e5cbb66fcc91c6716595223a": ("<|start|>assistant",),
    # qwen2_5
    "55b2f4a26ac9ee719330a61a0c39d9e538b0e9322212f048326318cff4f8674a": ("\n",),
}

# What the template puts behind a turn, and is not of it.
_TRAILERS: Final[dict[str, str]] = {
    # llava_next
    "2c17243a977fd0643fb549a509a8e2684f45517df0f9f608d5893b719f16569f": " ",
    # diffusion_gemma
    "9aeb7eac68ad87bba7567e9d4597ff203e5609f1b427d9e823437d0142cc61bf": "<|tool_response>",
}


def moved_start(template: str, text: str, history: int, start: int) -> int:
    """Where a turn begins that begins at ``start``, behind a prompt that begins at ``history``."""
    thought = text.rfind(THOUGHT, history, start)
    if thought >= 0:
        # The prompt begins the thoughts, which end in the turn.
        return thought
    for header in _HEADERS.get(_digest(template), ()):
        if text.endswith(header, 0, start):
            return start - len(header)
    return start


def moved_end(template: str, text: str, stop: int) -> int:
    """Where a turn ends that ends at ``stop``."""
    trailer = _TRAILERS.get(_digest(template), "")
    return stop - len(trailer) if trailer and text.endswith(trailer, 0, stop) else stop


@lru_cache(maxsize=8)
def _digest(template: str) -> str:
    return hashlib.sha256(template.strip().encode()).hexdigest()
