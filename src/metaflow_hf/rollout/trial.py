"""Is a model rolled out correctly? A trial on a few random tokens.

Two short rows go through the rollout and through one ordinary pass, with a loss on the last token chunk only, so
that every gradient that reaches an earlier token has crossed a border; and again with a mask. Compared are the
logits of that chunk and the gradients with respect to the embedded tokens: they see every path through the layers,
and parameters keep their `.grad`.
Everything is left as it was: training flags, generators, gradients.

States that no gradient reaches are ignored by the model, however little that shows in a fresh one.
It cannot see what needs more tokens than it takes, such as a window that they do not fill.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metaflow_hf.errors import UnsupportedModelError
from metaflow_hf.rollout.causal_lm import CausalLM
from metaflow_hf.rollout.loss import cross_entropy_sum
from metaflow_hf.rollout.passes import ChunkPasses, Plan
from metaflow_hf.rollout.rng import rng_kept
from metaflow_hf.rollout.sequence import TokenSequence, token_chunks
from metaflow_hf.rollout.settings import own_checkpointing_off

_log = logging.getLogger("metaflow_hf.rollout")

_NUM_TOKENS = 23
_CHUNK_SIZE = 6
_IGNORE = -100
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-4, torch.float16: 5e-2}
_COARSE_TOLERANCE = 0.15  # bf16
_CAUSAL_TOLERANCE = 1e-7  # a masked token gets a gradient of exactly zero
_BIDIRECTIONAL = (
    "its logits at a token depend on later tokens (bidirectional attention); the rollout takes causal models"
)
# What a model's own code raises when it meets a cache of another kind than the one it was written for.
_MODEL_FAULTS = (
    *(AttributeError, TypeError, ValueError, LookupError),
    *(AssertionError, NotImplementedError, RuntimeError),
)


@dataclass(frozen=True)
class RolloutReport:
    """What the rollout can do with a model.

    `exact`, `truncated`: these gradients are right; `reasons`: why not, one line each, empty when both are.
    `attention_by_blocks`: every attention layer can be given its past without a mask over it.
    `linear_head`: the logits are the head's output unchanged, so the loss never needs all logits at once.
    `bytes_per_token`: keys, values and their gradient per token of one row; `bytes_per_token_chunk`: recurrent
    states per token chunk of one row. `unmasked_only`: a batch whose mask cannot be done without (padding between
    tokens, or labels on it) is refused; padding at the ends of rows and packed documents need none.
    """

    exact: bool
    truncated: bool
    reasons: tuple[str, ...]
    attention_by_blocks: bool = False
    linear_head: bool = False
    bytes_per_token: int = 0
    bytes_per_token_chunk: int = 0
    unmasked_only: bool = False


class Trial:
    """One trial of one model."""

    def __init__(self, lm: CausalLM) -> None:
        self._lm = lm
        self._tolerance = _TOLERANCE.get(lm.model.dtype, _COARSE_TOLERANCE)
        if lm.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
            self._tolerance = max(self._tolerance, 1e-2)
        self._embedded: list[Tensor] = []
        self._stage = "an ordinary pass"
        self._by_blocks = True

    def report(self) -> RolloutReport:
        """Attention by blocks where it is right, else the model's own on all keys."""
        by_blocks = self._try()
        if by_blocks.exact and by_blocks.truncated and not by_blocks.unmasked_only:
            return by_blocks
        self._by_blocks = False
        report = self._try()
        if by_blocks.exact and (report.unmasked_only or not report.exact):
            return by_blocks
        if report.exact or report.truncated:
            _log.info(f"{self._lm.name}: attention as the model has it. By blocks: {by_blocks}")
        return report

    def _try(self) -> RolloutReport:
        with _undisturbed(self._lm), self._embeddings_watched():
            try:
                return self._compare() if self._is_causal() else self._refusal(_BIDIRECTIONAL)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except UnsupportedModelError as error:
                return self._refusal(str(error))
            except _MODEL_FAULTS as error:
                return self._refusal(f"{self._stage} raises {type(error).__name__}: {error}")

    def _refusal(self, reason: str) -> RolloutReport:
        advice = "Train it with plain backpropagation (use_chunked_training: false)."
        return RolloutReport(exact=False, truncated=False, reasons=(f"{self._lm.name}: {reason}. {advice}",))

    def _compare(self) -> RolloutReport:
        report = self._compare_on(self._sequence(padded=False))
        if not report.truncated:
            return report
        try:
            masked = self._compare_on(self._sequence(padded=True))
        except _MODEL_FAULTS as error:
            _log.info(f"{self._lm.name}: {self._stage} with a mask raises {type(error).__name__}: {error}")
            return replace(report, unmasked_only=True)
        if masked.truncated and masked.exact >= report.exact:
            return replace(report, linear_head=report.linear_head and masked.linear_head)
        return replace(report, unmasked_only=True)

    def _compare_on(self, sequence: TokenSequence) -> RolloutReport:
        exact, truncated = True, True
        logits, gradient, linear_head = self._full(sequence)
        bytes_per_token = bytes_per_token_chunk = 0
        for is_exact in (True, False):
            passes, found_logits, found_gradient = self._chunked(sequence, exact=is_exact)
            if unused := passes.unused_layers():
                return self._refusal(f"layers {unused} keep their past outside of the cache they are given")
            if ignored := passes.ignored_layers():
                return self._refusal(
                    f"layers {ignored} begin each token chunk anew instead of from their states"
                )
            if not self._close(found_logits, logits):
                return self._refusal("its logits given a cached past differ from those of one pass")
            same = [self._close(found_gradient[:, a:b], gradient[:, a:b]) for a, b in passes.chunks]
            truncated &= same[-1]
            if is_exact:
                exact &= all(same)
                bytes_per_token = passes.token_bytes() // sequence.input_ids.numel()
                bytes_per_token_chunk = passes.border_bytes() // len(passes.chunks) // len(sequence.input_ids)
        reasons: tuple[str, ...] = ()
        if not (exact and truncated):
            reasons = self._refusal("its gradients across token chunks differ from those of one pass").reasons
        return RolloutReport(
            exact=exact,
            truncated=truncated,
            reasons=reasons,
            attention_by_blocks=self._by_blocks,
            linear_head=linear_head,
            bytes_per_token=bytes_per_token,
            bytes_per_token_chunk=bytes_per_token_chunk,
        )

    def _full(self, sequence: TokenSequence) -> tuple[Tensor, Tensor, bool]:
        """Counted logits, gradient with respect to the embedded tokens, and whether the head is linear."""
        inputs = sequence.model_inputs(0, sequence.num_tokens)
        self._embedded.clear()
        with torch.enable_grad():
            logits = self._lm.logits(inputs, None)
            cross_entropy_sum(logits, sequence.targets, _IGNORE, None).backward()
        gradient = self._gradient()
        counted = sequence.targets != _IGNORE
        return logits[counted].detach(), gradient, self._is_head_linear(inputs)

    def _chunked(self, sequence: TokenSequence, *, exact: bool) -> tuple[ChunkPasses, Tensor, Tensor]:
        captured: list[Tensor] = []

        def capture(logits: Tensor, targets: Tensor) -> Tensor:
            captured.append(logits.detach())
            return cross_entropy_sum(logits, targets, _IGNORE, None)

        plan = Plan(
            _CHUNK_SIZE,
            exact,
            use_cpu_offload=False,
            gradient_checkpointing=False,
            ce_loss_fn=capture,
            attention_by_blocks=self._by_blocks,
        )
        passes = ChunkPasses(self._lm, sequence, plan, linear_head=False)
        self._embedded.clear()
        self._stage = "a pass with a key-value carry"
        passes.losses_and_backward(torch.ones((), device=self._lm.device))
        if exact:
            self._embedded.reverse()
        return passes, torch.cat(captured), self._gradient()

    @torch.no_grad()
    def _is_head_linear(self, inputs: dict[str, Tensor]) -> bool:
        """The head reads the backbone's output as it is, and its own output is the logits as they are.

        Caps and scales hardly show on small logits, so large ones are put in the head's place.
        """
        head = self._lm.head
        if self._lm.model.base_model is self._lm.model or not hasattr(head, "weight"):
            return False
        seen: list[Tensor] = []

        def replace(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.extend((args[0], torch.linspace(-1e3, 1e3, output.numel()).view_as(output).to(output)))
            return seen[1]

        handle = head.register_forward_hook(replace)
        try:
            logits = self._lm.logits(inputs, None)
        finally:
            handle.remove()
        if len(seen) != 2:
            return False
        hidden = self._lm.hidden(inputs, None)
        same_input = hidden.shape == seen[0].shape and self._close(seen[0], hidden)
        return same_input and torch.equal(logits, seen[1])

    def _is_causal(self) -> bool:
        """No gradient of an early logit reaches a later token. Finer than comparing logits, which hardly move."""
        sequence = self._sequence(padded=False)
        half = sequence.num_tokens // 2
        self._embedded.clear()
        with torch.enable_grad():
            logits = self._lm.logits(sequence.model_inputs(0, sequence.num_tokens), None)
            cross_entropy_sum(logits[:, :half], sequence.input_ids[:, 1 : half + 1], _IGNORE, None).backward()
        gradient = self._gradient().double()
        if not gradient.isfinite().all():
            raise UnsupportedModelError("its gradients on a few random tokens, in one pass, are not finite")
        return bool(gradient[:, half:].norm() <= _CAUSAL_TOLERANCE * gradient[:, :half].norm())

    def _gradient(self) -> Tensor:
        return torch.cat([_gradient_or_zero(leaf) for leaf in self._embedded], dim=1)

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        """Relative to the norm of what is expected, within what the model's type allows."""
        difference = (found.double() - expected.double()).norm()
        return bool(difference <= self._tolerance * expected.double().norm()) and bool(found.isfinite().all())

    def _sequence(self, *, padded: bool) -> TokenSequence:
        """Two rows, one of them padded on the left; only the targets of the last token chunk count."""
        limit = getattr(self._lm.config, "max_position_embeddings", None) or _NUM_TOKENS
        length = min(_NUM_TOKENS, limit)
        weights = (self._lm.model.get_input_embeddings().weight, getattr(self._lm.head, "weight", None))
        vocabulary = min(weight.shape[0] for weight in weights if weight is not None)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (2, length), generator=generator).to(self._lm.device)
        padding = getattr(self._lm.model.get_input_embeddings(), "padding_idx", None)
        if padding is not None:  # its zeros have no gradient in a norm without epsilon
            ids = ids.masked_fill(ids == padding, (padding + 1) % vocabulary)
        labels = ids.clone()
        labels[:, : token_chunks(length, _CHUNK_SIZE)[-1][0] + 1] = _IGNORE
        batch = {"input_ids": ids, "labels": labels}
        if padded:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][1, : _CHUNK_SIZE + 2] = 0
        return TokenSequence.from_batch(batch, _IGNORE, self._lm.device)

    @contextmanager
    def _embeddings_watched(self) -> Iterator[None]:
        """Embedded tokens become leaves, kept in the order of the passes that have a graph."""

        def watch(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            leaf = output.detach()
            if torch.is_grad_enabled():
                self._embedded.append(leaf.requires_grad_())
            return leaf.clone()  # some models scale embeddings in place, which no leaf allows

        handle = self._lm.model.get_input_embeddings().register_forward_hook(watch)
        try:
            yield
        finally:
            handle.remove()


def _gradient_or_zero(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@contextmanager
def _undisturbed(lm: CausalLM) -> Iterator[None]:
    """Evaluation mode, frozen parameters, no autocast; all of it undone, and the generators put back."""
    training = [(module, module.training) for module in lm.model.modules()]
    trainable = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    autocast = torch.autocast(lm.device.type, enabled=False)
    with rng_kept(lm.device), own_checkpointing_off(lm.model), autocast:
        try:
            lm.model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, flag in training:
                module.training = flag
