"""DDP over two processes (gloo): gradients are the mean over ranks in both call styles."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

WORLD = 2


def test_both_call_styles_leave_what_ddp_itself_would(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_rank, args=(port, str(tmp_path)), nprocs=WORLD, start_method="fork")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for style in ("two_calls", "one_call", "accumulated"):
        for rank in range(WORLD):
            for name, expected in results[rank]["ddp_" + style].items():
                found = results[rank][style][name]
                assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7), (style, rank, name)
    for rank in range(WORLD):  # a rank without a gradient takes part in the type that the others add up in
        assert results[rank]["missing"]["lent"].equal(torch.tensor([1.0, 2.0, 1.0 + 2**-20]))
    assert not results[0]["local"]["model.norm.weight"].equal(results[1]["local"]["model.norm.weight"])


def _rank(rank: int, port: int, directory: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from metaflow_hf.rollout import chunked_segment_rollout

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = DistributedDataParallel(AutoModelForCausalLM.from_config(config))
    batches = [
        {"input_ids": torch.randint(0, 50, (1, 21), generator=torch.Generator().manual_seed(10 * rank + i))}
        for i in range(2)
    ]

    def plain(batch: dict[str, Any]) -> None:
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten()).backward()

    def rolled(batch: dict[str, Any], *, backward: bool) -> None:
        loss, _ = chunked_segment_rollout(model, batch, chunk_size=6, backward=backward)
        if not backward:
            loss.backward()

    def taken() -> dict[str, torch.Tensor]:
        found = {n: p.grad.clone() for n, p in model.module.named_parameters()}
        model.zero_grad()
        return found

    results: dict[str, Any] = {}
    plain(batches[0])
    results["ddp_two_calls"] = results["ddp_one_call"] = taken()
    for style, backward in (("two_calls", False), ("one_call", True)):
        rolled(batches[0], backward=backward)
        results[style] = taken()
    with model.no_sync():
        rolled(batches[0], backward=True)
    results["local"] = {n: p.grad.clone() for n, p in model.module.named_parameters()}
    rolled(batches[1], backward=True)
    results["accumulated"] = taken()
    with model.no_sync():
        plain(batches[0])
    plain(batches[1])
    results["ddp_accumulated"] = taken()
    results["missing"] = {"lent": _added_up_where_one_rank_has_none(rank)}
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def _added_up_where_one_rank_has_none(rank: int) -> torch.Tensor:
    from metaflow_hf.rollout.replicas import add_up_gradients

    narrow = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    narrow.grad_dtype = torch.float32
    if rank == 0:
        narrow.grad = torch.tensor([1.0, 2.0, 1.0 + 2**-20])
    add_up_gradients([narrow])
    assert narrow.grad is not None
    return narrow.grad


@pytest.fixture(autouse=True)
def _no_leftover_group():
    assert not dist.is_initialized()
