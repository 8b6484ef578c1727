"""Attention of some queries to one block of keys, with the log-sum-exp that lets blocks be merged.

    out = softmax(scale · q kᵀ) v        lse = log Σ exp(scale · q kᵀ)

Two results over disjoint keys merge to the one over their union (Milakov and Gimelshein 2018; FlashAttention,
Dao et al. 2022). Backwards no merge is needed: given `out`, `lse` and the gradient of the union, each block's
kernel returns that block's own share of the gradients, because exp(scale · q kᵀ - lse) is already the
softmax over the union.

Shapes, here and in attention.py: B batch, N query heads, K key heads (N a multiple of K), C queries, T keys,
D head size. q [B, N, C, D]; k, v [B, K, T, D]; out [B, N, C, D]; lse [B, N, C] in at least fp32. `causal`
only for C = T: query i sees keys 0 … i.

    flash on a CPU    torch's own kernel, any floating type
    flash on CUDA     FlashAttention-2 in torch, fp16 and bf16
    tiled             matrix products over tiles of queries, any device, type and head size; soft caps
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

_log = logging.getLogger("metaflow_hf.rollout")

_TILE_BYTES = 64 * 2**20
_FLASH_CUDA_MAX_HEAD = 256
_CHECKED_TO = 2e-2  # of the norm; a kernel that means something else is off by the norm itself


def _operator(name: str) -> Any:
    return getattr(torch.ops.aten, name)


_CPU_FORWARD = _operator("_scaled_dot_product_flash_attention_for_cpu")
_CPU_BACKWARD = _operator("_scaled_dot_product_flash_attention_for_cpu_backward")
_CUDA_FORWARD = _operator("_scaled_dot_product_flash_attention")
_CUDA_BACKWARD = _operator("_scaled_dot_product_flash_attention_backward")


class Kernel(Protocol):
    """One way to compute a block."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """(out, lse) of this block alone."""

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of this block, from `grad`, `out` and `lse` of the union of all blocks."""


class FlashCPU:
    """torch's flash attention for CPUs; it takes fewer key heads than query heads as they are."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        folded = q if causal else _fold(q, k)
        out, lse = _CPU_FORWARD(folded, k, v, 0.0, causal, scale=scale)
        return out.reshape(q.shape), lse.reshape(q.shape[:-1])

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = q.shape
        if not causal:
            grad, q, out, lse = _fold(grad, k), _fold(q, k), _fold(out, k), _fold(lse, k)
        dq, dk, dv = _CPU_BACKWARD(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
        return dq.reshape(shape), dk, dv


class FlashCUDA:
    """FlashAttention-2 as torch ships it, for CUDA and ROCm; fewer key heads than query heads as they are."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _CUDA_FORWARD(q, k, v, 0.0, causal, scale=scale)
        return out, lse[..., : q.shape[2]]

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv = _CUDA_BACKWARD(
            grad,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,  # cumulative lengths: all rows are of one length
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            no_seed,
            no_seed,
            scale=scale,
        )
        return dq, dk, dv


class Padded:
    """A kernel that takes one head size only, `head`: smaller ones are filled up with zeros, block by block."""

    def __init__(self, kernel: Kernel, head: int) -> None:
        self._kernel = kernel
        self._head = head

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, padded_v = self._padded(q, k, v)
        out, lse = self._kernel.forward(q, k, padded_v, scale, causal)
        return out[..., : v.shape[-1]], lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head_k, head_v = k.shape[-1], v.shape[-1]
        grad, q, k, v, out = self._padded(grad, q, k, v, out)
        dq, dk, dv = self._kernel.backward(grad, q, k, v, out, lse, scale, causal)
        return dq[..., :head_k], dk[..., :head_k], dv[..., :head_v]

    def _padded(self, *tensors: Tensor) -> list[Tensor]:
        return [functional.pad(tensor, (0, self._head - tensor.shape[-1])) for tensor in tensors]


class Tiled:
    """Plain matrix products, one tile of queries at a time (at most 64 MiB of scores).

    `softcap`: scores become cap · tanh(score / cap) before the softmax, as in Gemma 2.
    """

    def __init__(self, softcap: float | None = None) -> None:
        self._softcap = softcap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for start, stop in self._tiles(q, k):
            seen = stop if causal else k.shape[2]
            scores = self._scores(q[:, :, start:stop], k[:, :, :seen], scale, start if causal else None)
            lse = scores.logsumexp(dim=-1)
            weights = (scores - lse[..., None]).exp_()
            outs.append(_times(weights, v[:, :, :seen]).to(q.dtype))
            lses.append(lse)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
        for start, stop in self._tiles(q, k):
            seen, tile = (stop if causal else k.shape[2]), slice(start, stop)
            keys, values, wide = k[:, :, :seen], v[:, :, :seen], grad[:, :, tile].to(lse.dtype)
            scores = self._scores(q[:, :, tile], keys, scale, start if causal else None)
            weights = (scores - lse[:, :, tile, None]).exp_()
            dv[:, :, :seen] += _transposed_times(weights, wide, v)
            inner = (wide * out[:, :, tile]).sum(dim=-1, keepdim=True)
            d_scores = weights * (_times(wide, values.transpose(2, 3)) - inner)
            if self._softcap is not None:
                capped = (scores / self._softcap).nan_to_num_(neginf=0.0)
                d_scores *= 1 - capped.square_()
            dq[:, :, tile] = (_times(d_scores, keys) * scale).to(q.dtype)
            dk[:, :, :seen] += _transposed_times(d_scores, q[:, :, tile].to(lse.dtype), k) * scale
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _scores(self, q: Tensor, k: Tensor, scale: float, first: int | None) -> Tensor:
        scores = _times(q.to(_wide(q.dtype)), k.transpose(2, 3)) * scale
        if self._softcap is not None:
            scores = self._softcap * torch.tanh(scores / self._softcap)
        if first is not None:
            later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu_(first + 1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores

    def _tiles(self, q: Tensor, k: Tensor) -> list[tuple[int, int]]:
        row = q.shape[0] * q.shape[1] * k.shape[2] * _wide(q.dtype).itemsize
        size = max(_TILE_BYTES // max(row, 1), 16)
        return [(start, min(start + size, q.shape[2])) for start in range(0, q.shape[2], size)]


def kernel_for(q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None) -> tuple[Kernel, str]:
    """The fastest kernel that computes these exactly, and its name with the reason where it is not flash.

    A flash kernel of an accelerator is used after it agreed with plain matrix products, forwards and
    backwards, on a small example of the same type and head sizes.
    """
    if softcap is not None:
        return Tiled(softcap), "tiled (soft cap)"
    head, multiple = max(k.shape[-1], v.shape[-1]), 1 if q.device.type == "cpu" else 8
    head += -head % multiple
    if q.device.type == "cpu":
        kernel: Kernel = FlashCPU()
    elif reason := _why_not_flash(q.device, q.dtype, head, q.shape[1] // k.shape[1]):
        return Tiled(), f"tiled ({reason})"
    else:
        kernel = FlashCUDA()
    if k.shape[-1] == v.shape[-1] == head:
        return kernel, "flash"
    return Padded(kernel, head), f"flash (head sizes {k.shape[-1]} and {v.shape[-1]} filled up to {head})"


@functools.cache
def _why_not_flash(device: torch.device, dtype: torch.dtype, head: int, groups: int) -> str | None:
    if device.type != "cuda":
        return f"no flash kernel for {device.type}"
    if dtype not in {torch.float16, torch.bfloat16}:
        return f"flash on CUDA knows no {str(dtype).removeprefix('torch.')}"
    if head > _FLASH_CUDA_MAX_HEAD:
        return f"head size {head}"
    try:
        worst = max(
            _disagreement(FlashCUDA(), device, dtype, head, groups, causal) for causal in (False, True)
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        return f"flash on {torch.cuda.get_device_name(device)}: {error}"
    return (
        None
        if worst < _CHECKED_TO
        else f"flash on {torch.cuda.get_device_name(device)} is off by {worst:.2g}"
    )


@torch.no_grad()
def _disagreement(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head: int, groups: int, causal: bool
) -> float:
    """Largest relative difference to `Tiled`, of a block that is one of two (so that its lse is not its own)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, groups, 32, head), *[(1, 1, 32 if causal else 48, head)] * 2, (1, groups, 32, head)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    results = []
    for candidate in (kernel, Tiled()):
        out, lse = candidate.forward(q, k, v, head**-0.5, causal)
        results.append((out, lse, *candidate.backward(grad, q, k, v, out / 2, lse + 0.7, head**-0.5, causal)))
    pairs = zip(*results, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """[B, N, C, …] -> [B, K, N/K·C, …]: the queries of all heads that share a key head, one after the other.

    Where every query sees every key they are simply more queries, and the kernel reads each key once.
    """
    return x.reshape(x.shape[0], k.shape[1], -1, *x.shape[3:])


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Products a · b, [B, N, C, x] and [B, K, x, y] -> [B, N, C, y]; N/K of a's heads share one of b's."""
    folded = _fold(a, b)
    return (folded @ b.to(a.dtype)).reshape(*a.shape[:3], b.shape[3])


def _transposed_times(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Σ over heads that share a key head of aᵀ b: [B, N, C, T], [B, N, C, D] -> [B, K, T, D]."""
    return _fold(a, like).transpose(2, 3) @ _fold(b, like)
