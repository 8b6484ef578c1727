"""transformers computes norms, routers, softmax and states in fp32 whatever the model's type; inside, fp64 stays fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

_float, _to, _type, _softmax = Tensor.float, Tensor.to, Tensor.type, F.softmax
_tensor_softmax, _sum = Tensor.softmax, Tensor.sum
_zeros_like = torch.zeros_like


def _wide_float(self: Tensor) -> Tensor:
    return self if self.dtype == torch.float64 else _float(self)


def _wide_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.dtype == torch.float64:
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
    return _to(self, *args, **kwargs)


def _wide_type(self: Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    if self.dtype == torch.float64 and dtype is torch.float32:
        return self
    return _type(self, dtype, **kwargs)


def _wide(softmax: Any) -> Any:
    def wide(*args: Any, **kwargs: Any) -> Tensor:
        if args[0].dtype == torch.float64:
            kwargs.pop("dtype", None)
        return softmax(*args, **kwargs)

    return wide


def _wide_sum(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.dtype == torch.float64 and kwargs.get("dtype") is torch.float32:
        kwargs.pop("dtype")
    return _sum(self, *args, **kwargs)


def _wide_zeros_like(like: Tensor, **kwargs: Any) -> Tensor:
    if like.dtype == torch.float64 and kwargs.get("dtype") is torch.float32:
        kwargs.pop("dtype")
    return _zeros_like(like, **kwargs)


@contextmanager
def fp64_inside() -> Iterator[None]:
    """Casts of fp64 tensors to fp32 do nothing."""
    with (
        mock.patch.object(Tensor, "float", _wide_float),
        mock.patch.object(Tensor, "to", _wide_to),
        mock.patch.object(Tensor, "type", _wide_type),
        mock.patch.object(Tensor, "softmax", _wide(_tensor_softmax)),
        mock.patch.object(F, "softmax", _wide(_softmax)),
        mock.patch.object(Tensor, "sum", _wide_sum),
        mock.patch.object(torch, "sum", _wide_sum),
        mock.patch.object(torch, "zeros_like", _wide_zeros_like),
        mock.patch.object(torch, "softmax", _wide(torch.softmax)),
    ):
        yield
