"""How long a token chunk can be: estimated from what a graph keeps, held against what it really keeps."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metaflow_hf.rollout import chunked_segment_rollout
from metaflow_hf.rollout.causal_lm import CausalLM
from metaflow_hf.rollout.memory import LARGEST_TOKENS, SMALLEST_TOKENS, ChunkSizer, kept_bytes_per_token
from metaflow_hf.rollout.probe import require

GIB = 2**30


def _sizer(model, **options):
    settings = {"exact": True, "use_cpu_offload": False, "gradient_checkpointing": False, **options}
    return ChunkSizer(model, **settings)


def test_more_memory_gives_longer_chunks_and_never_shorter_or_longer_than_the_limits(make_model):
    sizer = _sizer(make_model("llama"))
    sizes = [sizer.tokens(1, 100_000, free_bytes=int(free * GIB)) for free in (0.1, 0.25, 0.3, 0.4, 1000)]

    assert sizes == sorted(sizes)
    assert sizes[0] == SMALLEST_TOKENS
    assert sizes[-1] == LARGEST_TOKENS
    assert len(set(sizes)) > 2
    assert all(size & (size - 1) == 0 for size in sizes)


def test_carry_on_the_device_leaves_less_than_in_host_memory_and_checkpointing_more(make_model):
    model = make_model("llama")
    long = 2_000_000
    free = int(require(model, exact=True).bytes_per_token * long / 0.9) + GIB // 8

    plain, checkpointed, offloaded = (
        _sizer(model, **options).tokens(1, long, free)
        for options in ({}, {"gradient_checkpointing": True}, {"use_cpu_offload": True})
    )

    assert plain <= checkpointed <= offloaded
    assert plain < offloaded


def test_what_does_not_fit_is_said_with_what_helps(make_model, caplog):
    caplog.set_level(logging.INFO, "metaflow_hf.rollout")

    _sizer(make_model("llama")).tokens(1, 10_000_000, free_bytes=GIB)

    assert "will hardly fit in 1.0 GiB; try use_cpu_offload: true" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_estimate_covers_what_the_graph_of_a_longer_chunk_keeps(family, make_model):
    lm = CausalLM(make_model(family, dtype=torch.float32))
    report = require(lm.model, exact=True)
    estimate = kept_bytes_per_token(lm, report, 2, checkpointed=False)

    seen, outside = {}, {p.untyped_storage().data_ptr() for p in lm.model.parameters()}

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(2, 192, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = lm.logits({"input_ids": ids}, None)
    real = sum(nbytes for pointer, nbytes in seen.items() if pointer not in outside) / 192

    assert output.requires_grad
    assert 0.9 * real < estimate < 2 * real


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"gradient": "truncated"}],
    ids=["plain", "gc", "truncated"],
)
def test_nothing_of_a_token_chunk_waits_for_the_garbage_collector(options, make_model, tokens):
    """A tensor in a reference cycle keeps its whole graph until Python looks for cycles, which may be never."""
    model, batch = make_model("llama"), {"input_ids": tokens(1, 40)}
    chunked_segment_rollout(model, batch, chunk_size=8, backward=True, **options)
    gc.collect()
    gc.disable()
    try:
        with _NewTensors() as new:
            chunked_segment_rollout(model, batch, chunk_size=8, backward=True, **options)
        alive = [size for size in new.alive.values() if size >= 8 * 32]
    finally:
        gc.enable()

    assert new.count > 100
    assert alive == []


class _NewTensors(TorchDispatchMode):
    """Sizes of the storages that were made inside and still are."""

    def __init__(self):
        super().__init__()
        self.alive, self.count = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata], self.count = tensor.numel(), self.count + 1
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        return result
