"""Forward hooks that catch one layer's queries and keys as it runs.

tap = AttentionTap(inner_model, "middle", reduce=saliency)
with tap.recording(rows=x.shape[0]) as seen:
    inner_model(x, sigma)
seen.map()                                                     # (b, h', w')
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ksag.attention import find_attention, hint
from ksag.families import Applied, Outputs, WatchSDPA, read_sdpa

Reduce: TypeAlias = Callable[[Tensor, Tensor, float, int], Tensor]
"""q (b, heads, tokens, dim), k (b, heads, memory + tokens, dim), the layer's scale, and memory → (b, tokens)."""


def check_not_compiled(inner_model: nn.Module, path: str) -> None:
    """Raises a RuntimeError if a module around or inside the layer is compiled: hooks set from now on may never run."""
    layer = inner_model.get_submodule(path)
    around = [inner_model.get_submodule(".".join(path.split(".")[:i])) for i in range(len(path.split(".")))]
    for module in (*around, *layer.modules()):
        compiled_forward = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None or compiled_forward:
            raise RuntimeError(
                f"The {type(module._modules.get('_orig_mod', module)).__name__} that holds {path!r} was compiled before it was "
                f"wrapped, and a compiled model does not run hooks that are set later. Wrap first, compile afterwards: "
                f"guided = ksag.SAGDenoiser(denoiser); denoiser.inner_model = torch.compile(unet). "
                f"(The model as it was is torch.compile's result's ._orig_mod.)"
            )


class Recording:
    """What a tap has seen so far of the first `rows` samples that went through the layer."""

    def __init__(self, rows: int, path: str):
        self.rows = rows
        self.path = path
        self.batch: int | None = None
        self.grid: tuple[int, int] | None = None
        self.outputs: Outputs = {}
        self.sdpa: WatchSDPA | None = None
        self.maps: list[Tensor] = []

    @property
    def missing(self) -> int:
        return self.rows - sum(m.shape[0] for m in self.maps)

    def map(self) -> Tensor:
        """(rows, h', w'): what `reduce` made of the layer's queries and keys."""
        if self.missing:
            raise RuntimeError(
                f"{self.path!r} ran for {self.rows - self.missing} of the latent's {self.rows} samples while inner_model ran, so "
                f"there is nothing to guide by. Is the layer part of this forward? Was the model compiled before it was "
                f"wrapped, or were its projections fused since? Then wrap it anew, and compile afterwards."
            )
        return torch.cat(self.maps) if len(self.maps) > 1 else self.maps[0]


class AttentionTap:
    """Forward hooks on one self-attention layer, set once and idle outside `with tap.recording(...)`.

    While recording, the queries and keys of the first rows of the batch are reduced as soon as the layer has run, so
    that neither outlives it. Each thread records for itself. The hooks replace nothing: the layer runs as it always does.

    A layer of a known family can be compiled, whole, after it was tapped. Of any other, a TorchFunctionMode sees the call
    of scaled_dot_product_attention while the layer runs; inside a compiled graph there is no such call to see.

    Args:
        inner_model: the denoiser that holds the layer.
        attention: as in `find_attention`.
        reduce: q (b, heads, tokens, dim), k (b, heads, memory + tokens, dim), scale, and memory → (b, tokens).
    """

    def __init__(self, inner_model: nn.Module, attention: str | nn.Module, reduce: Reduce):
        self.path, self.layer, self.family = find_attention(inner_model, attention)
        check_not_compiled(inner_model, self.path)
        self.reduce = reduce
        self.grid: tuple[int, int] | None = None
        self._by_thread: dict[int, Recording] = {}
        self._traced: Recording | None = None
        self._hint = hint(inner_model, self.path)
        names = self.path.split(".") if self.path else []
        around = [inner_model.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]
        sources = {name: getattr(self.layer, name, None) for name in (self.family.sources if self.family else ())}
        self._sources = {name: module for name, module in sources.items() if isinstance(module, nn.Module)}
        # An unknown layer may resample inside, so that the nearest spatial input before its call can be a submodule's.
        inside = [] if self.family else [module for module in self.layer.modules() if module is not self.layer]
        self._handles = [module.register_forward_pre_hook(self._see_grid, with_kwargs=True) for module in (*around, *inside)]
        for name, module in self._sources.items():
            self._handles.append(module.register_forward_hook(functools.partial(self._see_output, name)))
        if self.family is None:
            self._handles.append(self.layer.register_forward_pre_hook(self._watch))
            self._handles.append(self.layer.register_forward_hook(self._unwatch, always_call=True))
        self._handles.append(self.layer.register_forward_hook(self._see_layer))

    @property
    def closed(self) -> bool:
        return not self._handles

    def close(self) -> None:
        """Removes every hook. Calling it twice does no harm."""
        while self._handles:
            self._handles.pop().remove()

    @contextlib.contextmanager
    def recording(self, rows: int) -> Iterator[Recording]:
        """Records the first `rows` samples that go through the layer, until the block is left, however it is left."""
        for name, module in self._sources.items() if rows else ():
            if getattr(self.layer, name, None) is not module:
                raise RuntimeError(f"{self.path}.{name} was replaced since it was wrapped (by a LoRA?). Wrap the model anew.")
        recording = self._traced = Recording(rows, self.path)
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        self._by_thread[thread] = recording
        try:
            yield recording
        finally:
            self._traced = None
            del self._by_thread[thread]

    def _begun(self) -> Recording | None:
        # Dynamo cannot trace get_ident, so a compiled forward finds the recording in a plain attribute.
        return self._traced if torch.compiler.is_compiling() else self._by_thread.get(threading.get_ident())

    def _current(self) -> Recording | None:
        recording = self._begun()
        return recording if recording is not None and recording.missing else None

    def _see_grid(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # The pre-hooks run from the outermost module inwards, so the last spatial input is the nearest one.
        recording = self._current()
        if recording is None or (recording.sdpa is not None and recording.sdpa.calls):
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim == 4:
                patch = getattr(getattr(module, "patch_in", None), "patch_size", (1, 1))  # k-diffusion's transformers cut it up
                recording.batch, recording.grid = value.shape[0], (value.shape[2] // patch[0], value.shape[3] // patch[1])
                break

    def _see_output(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if recording := self._current():
            recording.outputs.setdefault(name, []).append(output.detach())

    def _watch(self, layer: nn.Module, args: tuple) -> None:
        if recording := self._current():
            recording.sdpa = WatchSDPA()
            recording.sdpa.__enter__()

    def _unwatch(self, layer: nn.Module, args: tuple, output: Any) -> None:
        recording = self._begun()
        if recording is not None and recording.sdpa is not None:
            recording.sdpa.__exit__(None, None, None)

    def _see_layer(self, layer: nn.Module, args: tuple, output: Any) -> None:
        recording = self._current()
        if recording is None:
            return
        applied = self.family.read(layer, recording.outputs) if self.family else self._read_call(recording)
        recording.outputs = {}
        if applied is None:
            return
        q, k, scale, grid, memory = applied
        tokens = k.shape[2] - memory
        grid = grid or recording.grid
        if grid is None or q.shape[2] != tokens or tokens != grid[0] * grid[1]:
            raise ValueError(
                f"{self.path!r} attends from {q.shape[2]} to {tokens} tokens, which is not its input's grid of "
                f"{grid}: it is no self-attention over the image. Name another layer; ksag.list_attention shows them."
            )
        self.grid = grid
        rows = recording.missing
        recording.maps.append(self.reduce(q[:rows], k[:rows], scale, memory).unflatten(1, grid))

    def _read_call(self, recording: Recording) -> Applied:
        calls = recording.sdpa.calls if recording.sdpa else []
        recording.sdpa = None
        try:
            if len(calls) != 1:
                raise ValueError(f"it calls scaled_dot_product_attention {len(calls)} times while it runs, where once was expected")
            return read_sdpa(calls[0], recording.batch, recording.grid)
        except ValueError as error:
            raise ValueError(
                f"{self.path!r} is a {type(self.layer).__name__} of no family that ksag knows, and its attention cannot be read: "
                f"{error}. Name the module around just that one call. {self._hint}"
            ) from None
