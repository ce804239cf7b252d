"""Forward hooks that catch what one layer attends with, as it runs.

tap = AttentionTap(inner_model, "middle")
with tap.recording(rows=x.shape[0]) as seen:
    inner_model(x, sigma)
seen.saliency()                                                # (b, h', w')
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ksag.attention import check as selfcheck
from ksag.attention.families import Attention, sdpa
from ksag.attention.find import WATCHERS, find_attention, hint
from ksag.attention.recording import Recording
from ksag.attention.saliency import saliency
from ksag.model import compiled
from ksag.model.threads import PerThread


def _resolve(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _described(args: tuple, kwargs: dict) -> tuple:
    """Which arguments a layer is given, and which options in a mapping among them."""
    given = (*enumerate(args), *sorted(kwargs.items()))
    return tuple((name, tuple(map(str, value)) if isinstance(value, Mapping) else "") for name, value in given if value is not None)


class AttentionTap:
    """Forward hooks on one self-attention layer, idle outside `with tap.recording(...)`.

    While recording, the queries and keys of the first rows of the batch become a saliency map as soon as the layer has attended,
    so that neither outlives it. Each thread records for itself. The hooks replace nothing: the layer runs as it always does.

    At the first recording, and when the layer's code path is seen to change, what was read is checked against what the layer
    handed to its output projection. Where a family's reading does not stand, that of its scaled_dot_product_attention may.

    A layer of a known family can be compiled, whole, after it was tapped; its first recording runs eagerly, where PyTorch can do
    so (2.6 or later). Of any other, a TorchFunctionMode sees the call of scaled_dot_product_attention while the layer runs; inside
    a compiled graph there is no such call to see.

    Args:
        inner_model: the model that holds the layer.
        attention: which one, as in `find_attention`.
        check: whether to check.

    Raises:
        ValueError: no such layer, or none that is supported.
        RuntimeError: a module around or inside the layer was compiled before.
    """

    is_copy = False
    """Whether it came along with the copy of a model that it is hooked to: it sees nothing then."""

    def __init__(self, inner_model: nn.Module, attention: str | nn.Module = "middle", check: bool = True):
        self.path, self.layer, self.family = find_attention(inner_model, attention)
        self.root, self.check = inner_model, check
        self.grid: tuple[int, int] | None = None
        self.checked = False
        self._code_path: tuple[tuple, tuple | None] | None = None
        self._to_check = check and self.family is not None
        self._through_sdpa = self.family is None
        self._changes_in_place = False
        self._hint = hint(inner_model, self.path)
        self._recording: PerThread[Recording | None] = PerThread(None)
        names = self.path.split(".") if self.path else []
        self._around = [inner_model.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]
        self._within = [*self._around, *self.layer.modules()]
        self._links = list(zip(self._around[:-1], names, self._around[1:], strict=True))
        compiled.refuse(self._within, self.path)
        _remove_copied_hooks(inner_model)
        self._sources: dict[str, nn.Module] = {}
        self._handles: list[Any] = []
        self._set_hooks()
        WATCHERS.setdefault(self.layer, weakref.WeakSet()).add(self)

    # The hooks

    def _find_sources(self) -> dict[str, nn.Module]:
        """The layer's submodules that a hook has to see, by name."""
        if self.family is None:
            return {}
        names = (*self.family.outputs, *self.family.inputs, self.family.projection)
        found = {name: _resolve(self.layer, name) for name in names}
        return {name: module for name, module in found.items() if isinstance(module, nn.Module)}

    def _submodules(self) -> list[nn.Module | None]:
        """What changes where a submodule that a hook has to see is replaced; quicker to look up than these."""
        holders = [self.layer, *(module for module in self.layer._modules.values() if module is not None)]
        return [module for holder in holders for module in holder._modules.values()]

    def _set_hooks(self) -> None:
        self._sources, self._hooked = self._find_sources(), self._submodules()
        # A layer of no known family may resample inside, so that the nearest spatial input before its call can be a submodule's.
        inside = [] if self.family else [module for module in self.layer.modules() if module is not self.layer]
        for module in (*self._around, *inside):
            self._handles.append(module.register_forward_pre_hook(self._see_input, with_kwargs=True))
        self._handles.append(self.layer.register_forward_pre_hook(self._begin, with_kwargs=True))
        for name, module in self._sources.items():
            assert self.family is not None
            if name == self.family.projection:
                self._handles.append(module.register_forward_pre_hook(self._see_projection))
            elif name in self.family.inputs:
                self._handles.append(module.register_forward_pre_hook(functools.partial(self._see_arguments, name)))
            else:
                self._handles.append(module.register_forward_hook(functools.partial(self._see_output, name)))
        self._handles.append(self.layer.register_forward_hook(self._end))

    def __reduce__(self) -> tuple:
        return _copied, ()

    @property
    def closed(self) -> bool:
        return not self._handles

    def close(self) -> None:
        """Removes every hook. Calling it twice does no harm."""
        while self._handles:
            self._handles.pop().remove()
        if self in WATCHERS.get(self.layer, ()):
            WATCHERS[self.layer].discard(self)

    def is_compiled(self, inner_model: nn.Module) -> bool:
        """Whether `inner_model` holds the layer inside something that was compiled after it was tapped."""
        replaced = any(parent._modules.get(name) is not child for parent, name, child in self._links)
        return replaced or inner_model is not self.root or any(map(compiled.is_compiled, self._within))

    # The life of a recording

    @property
    def to_check(self) -> bool:
        """Whether the next recording has to run eagerly, so that it can be checked."""
        if torch.compiler.is_dynamo_compiling():
            return False
        changed = self._code_path is not None and self._code_path[0] != self._parts()
        return self._to_check or (changed and self.check and self.family is not None)

    @contextlib.contextmanager
    def recording(self, rows: int) -> Iterator[Recording]:
        """Records the first `rows` samples that go through the layer, until the block is left, however it is left."""
        if not torch.compiler.is_dynamo_compiling():
            self._follow_changes()
        recording = Recording(rows, self.path)
        try:
            self._recording.set(recording)
            yield recording
        finally:
            recording.stop()
            self._recording.set(None)

    def _follow_changes(self) -> None:
        """Sets the hooks anew where the layer's submodules were replaced since: by a LoRA, or fused projections."""
        if self.closed or self._submodules() == self._hooked:
            return
        if self.is_compiled(self.root):
            raise RuntimeError(
                f"Submodules of {self.path!r} were replaced since it was wrapped (by a LoRA?), and it is compiled, so that new "
                f"hooks would not run. Wrap the model anew, then compile it."
            )
        while self._handles:
            self._handles.pop().remove()
        self._set_hooks()

    def _current(self) -> Recording | None:
        recording = self._recording.get()
        return recording if recording is not None and recording.missing else None

    def _see_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # The pre-hooks run from the outermost module inwards, so the last spatial input is the nearest one.
        recording = self._current()
        if recording is None or (recording.watch is not None and recording.watch.calls):
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim == 4:
                recording.batch, recording.spatial = value.shape[0], (value.shape[2], value.shape[3])
                recording.patch = self._patch_of(module)
                break

    def _patch_of(self, module: nn.Module) -> tuple[int, int]:
        size = _resolve(module, self.family.patch) if self.family and self.family.patch else None
        if size is None:
            return (1, 1)
        return (size, size) if isinstance(size, int) else tuple(size)

    def _begin(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if recording := self._current():
            self._start(recording, _described(args, kwargs))

    def _start(self, recording: Recording, arguments: tuple | None) -> None:
        """The layer begins to attend; without arguments where something around it asks for its parts one by one."""
        recording.stop()  # a model may have caught an error in the middle of the layer, and run it again
        recording.started = True
        if torch.compiler.is_dynamo_compiling():
            return
        code_path = self._parts(), arguments
        if code_path != self._code_path:
            self._code_path, self._to_check = code_path, self.check and self.family is not None
            self._through_sdpa, self.checked = self.family is None, False
        recording.checking = self._to_check and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        if recording.checking or self._through_sdpa:
            recording.watch = sdpa.WatchSDPA()
            recording.watch.__enter__()

    def _seeing(self) -> Recording | None:
        """The recording that a part of the layer, which just ran, belongs to."""
        recording = self._current()
        if recording is not None and not recording.started:
            self._start(recording, None)
        return recording

    def _parts(self) -> tuple:
        """What decides how the layer attends, as far as can be seen from outside."""
        forward = getattr(self.layer.forward, "__func__", self.layer.forward)
        return forward, getattr(self.layer, "processor", None), *self._sources.values()

    def _keep(self, recording: Recording, x: Tensor) -> Tensor:
        """What a submodule returned, as it is now: a view where the layer is known to leave it so."""
        x = x.detach()
        if not (recording.checking or self._changes_in_place):
            return x
        copy = x.clone()
        recording.kept.append((copy, x))
        return copy

    def _see_output(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if recording := self._seeing():
            recording.seen.setdefault(name, []).append(self._keep(recording, output))

    def _see_arguments(self, name: str, module: nn.Module, args: tuple) -> None:
        if recording := self._seeing():
            recording.seen.setdefault(name, []).append([self._keep(recording, x) for x in args])

    def _see_projection(self, projection: nn.Module, args: tuple) -> None:
        """The layer has attended."""
        recording = self._current()
        if recording is None:
            return
        assert self.family is not None
        read = self._read_call(recording) if self._through_sdpa else self.family.read(self.layer, recording.seen)
        if read is not None and recording.checking:
            read = self._checked(recording, read, args[0].detach())
        recording.stop()
        if read is not None:
            self._add(recording, read)

    def _end(self, layer: nn.Module, args: tuple, output: Any) -> None:
        recording = self._current()
        if recording is not None and self.family is None:
            read = self._read_call(recording)
            recording.stop()
            self._add(recording, read)

    # What was read → a map

    def _add(self, recording: Recording, read: Attention) -> None:
        self.grid = grid = self._grid_of(recording, read)
        q, k, _, scale, _, memory, mask = read.of(recording.missing)
        received = saliency(q, k, scale, memory, mask)
        recording.maps.append(received.unflatten(1, grid))

    def _grid_of(self, recording: Recording, read: Attention) -> tuple[int, int]:
        grid, tokens = read.grid or recording.grid, read.k.shape[2] - read.memory
        if grid is None or read.q.shape[2] != tokens or tokens != grid[0] * grid[1]:
            raise ValueError(
                f"{self.path!r} attends from {read.q.shape[2]} to {tokens} tokens, which is not its input's grid of "
                f"{grid}: it is no self-attention over the image. Name another layer; ksag.list_attention shows them."
            )
        return grid

    def _read_call(self, recording: Recording) -> Attention:
        calls = recording.watch.calls if recording.watch else []
        try:
            if len(calls) != 1:
                raise ValueError(f"it calls scaled_dot_product_attention {len(calls)} times while it runs, where once was expected")
            return sdpa.read(calls[0], recording.batch, recording.spatial)
        except ValueError as error:
            known = "no family that ksag knows" if self.family is None else "another way of attending than its family's"
            raise ValueError(
                f"{self.path!r} ({type(self.layer).__name__} of {known}): attention cannot be read: "
                f"{error}. Name the module around just that one call. {self._hint}"
            ) from None

    # The check

    def _checked(self, recording: Recording, read: Attention, applied: Tensor) -> Attention:
        """What was read, or what the layer's own call of scaled_dot_product_attention says, whichever gives what was applied."""
        assert self.family is not None
        if read.v is None or type(applied) is not Tensor:  # a tensor without data, say
            self._to_check = False
            return read
        error = self._error(recording, read, applied)
        if error != error:
            return read  # all is NaN, and the next call may tell
        if error > 1 and (call := self._own_call(recording, read)) and self._error(recording, call, applied) <= 1:
            self._to_check, self.checked, self._through_sdpa = False, True, True
            return call
        if error <= 1:
            self._to_check, self.checked = False, True
            self._changes_in_place = any(not torch.equal(copy, now) for copy, now in recording.kept)
            return read
        dropout = _resolve(self.layer, self.family.dropout)
        if getattr(dropout, "p", 0) > 0 and (dropout.training or self.family.drops_in_eval):
            self._to_check = False
            return read  # what was applied is what was read, thinned out at random
        raise ValueError(
            f"{self.path!r} ({type(self.layer).__name__}) is read as {self.family.name}, but the attention that it applied is "
            f"another than its projections give: they differ by {error:.0f} times what rounding explains. Likely "
            f"cause: {self._likely_cause()}. Name another layer as attention=, or pass check_attention=False if you know better."
        )

    def _error(self, recording: Recording, read: Attention, applied: Tensor) -> float:
        assert self.family is not None
        grid = read.grid or recording.grid or (1, read.q.shape[2])
        samples = recording.missing
        return selfcheck.error(read.of(samples), self.family.merged, grid, applied[:samples], self.family.computes_in)

    def _own_call(self, recording: Recording, read: Attention) -> Attention | None:
        """What the layer's only call of scaled_dot_product_attention attends with, if these are the sample's own tokens.

        A mask, a scale or a rotation leaves the values as they are. Keys of other samples bring their values with them.
        """
        try:
            call = self._read_call(recording).of(recording.missing)
        except ValueError:
            return None
        own = read.of(recording.missing)
        assert call.v is not None and own.v is not None
        return call if call.v.shape == own.v.shape and torch.allclose(call.v.float(), own.v.float(), rtol=0.01, atol=0.01) else None

    def _likely_cause(self) -> str:
        assert self._code_path is not None
        _, arguments = self._code_path
        if masks := [name for name, _ in arguments or () if "mask" in str(name)]:
            return f"its argument {' and '.join(masks)}"
        if (processor := getattr(self.layer, "processor", None)) is not None:
            return f"its processor, a {type(processor).__name__}, attends in a way of its own"
        return "a patch, option or replaced forward that changes its queries, keys or values"


def _copied() -> AttentionTap:
    """What the hooks on a copied model belong to, until the next tap on it removes them."""
    tap = AttentionTap.__new__(AttentionTap)
    tap.is_copy, tap._recording, tap._handles = True, PerThread(None), []
    return tap


def _remove_copied_hooks(root: nn.Module) -> None:
    for module in root.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for i, hook in list(hooks.items()):
                owner = getattr(getattr(hook, "func", hook), "__self__", None)  # of a method, or of a part of one
                if isinstance(owner, AttentionTap) and owner.is_copy:
                    del hooks[i]
                    flags.pop(i, None)
