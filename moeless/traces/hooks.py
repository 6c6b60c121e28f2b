"""Capturing what the routers of a running model decide.

Axes: T tokens of one forward pass (batch by position, flattened), L MoE layers, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moeless.errors import RunFailed
from moeless.traces.hf_spec import MoEBlock, find_blocks


@dataclass(frozen=True)
class Captured:
    """Routing of one forward pass: CPU tensors of ids i16 and weights f16 ``[T, L, K]``, gate inputs ``[T, L, H]``."""

    topk_TLK: Any
    weights_TLK: Any
    input_TLH: Any | None


class RouterCapture:
    """Hooks on every MoE layer of a model; each forward pass adds one :class:`Captured` to ``passes``."""

    def __init__(self, model: Any, *, router_inputs: str | None = None) -> None:
        import torch

        self.model = model
        self.blocks = find_blocks(model)
        self.passes: list[Captured] = []
        self._input_dtype = None if router_inputs is None else getattr(torch, router_inputs)
        self._layers: list[tuple[Any, Any] | None] = [None] * len(self.blocks)
        self._inputs: list[Any] = [None] * len(self.blocks)

    @contextmanager
    def recording(self) -> Iterator[RouterCapture]:
        """Hooks are in place inside the block."""
        handles = [self.model.register_forward_hook(self._end_of_pass)]
        for index, block in enumerate(self.blocks):
            handles += self._attach(index, block)
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> list[Captured]:
        """Passes since the last call."""
        passes, self.passes = self.passes, []
        return passes

    def _attach(self, index: int, block: MoEBlock) -> list[Any]:
        handles = []
        seen = block.gate if block.gate is not None else block.experts
        if seen is None:
            raise RunFailed(f"{block.name} has neither a router nor experts that can be observed")
        if block.experts is None:
            handles.append(seen.register_forward_hook(self._llama4_hook(index, seen.top_k)))
        else:
            handles.append(block.experts.register_forward_pre_hook(self._experts_hook(index), with_kwargs=True))
        if self._input_dtype is not None:
            handles.append(seen.register_forward_pre_hook(self._input_hook(index), with_kwargs=True))
        return handles

    def _experts_hook(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
            weights = args[2] if len(args) > 2 else kwargs["top_k_weights"]
            self._keep(index, ids, weights)

        return hook

    def _llama4_hook(self, index: int, top_k: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], result: Any) -> None:
            # the router returns dense scores, sigmoid of the logits on the chosen experts and 0 elsewhere
            scores, logits = result
            ids = logits.topk(top_k, dim=1).indices
            self._keep(index, ids, scores.gather(1, ids))

        return hook

    def _keep(self, index: int, ids: Any, weights: Any) -> None:
        if self._layers[index] is not None:
            raise RunFailed(f"{self.blocks[index].name} ran twice in one forward pass, which is not supported")
        # references only: converting once per pass costs a fraction of converting once per layer
        self._layers[index] = (ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1]))

    def _input_hook(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = args[0] if args else kwargs["hidden_states"]
            self._inputs[index] = seen.detach().reshape(-1, seen.shape[-1]).to(self._input_dtype, copy=True)

        return hook

    def _end_of_pass(self, module: Any, args: Any, result: Any) -> None:
        import torch

        missing = [block.name for block, kept in zip(self.blocks, self._layers, strict=True) if kept is None]
        if missing:
            raise RunFailed(f"{missing[0]} did not run in a forward pass, which is not supported")
        kept = [layer for layer in self._layers if layer is not None]
        inputs = None if self._input_dtype is None else _stack(self._inputs, self._input_dtype)
        topk = _stack([ids for ids, _ in kept], torch.int16)
        self.passes.append(Captured(topk, _stack([weights for _, weights in kept], torch.float16), inputs))
        self._layers = [None] * len(self.blocks)
        self._inputs = [None] * len(self.blocks)


def _stack(layers: list[Any], dtype: Any) -> Any:
    """``[T, L, ...]`` on the CPU: one copy from the device where all layers are on one."""
    import torch

    if len({tensor.device for tensor in layers}) > 1:
        layers = [tensor.cpu() for tensor in layers]
    return torch.stack(layers, dim=1).detach().to(dtype).cpu()
