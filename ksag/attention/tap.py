"""Forward hooks on one self-attention layer: they read what it attends with, and change what some rows of the batch attend to.

tap = AttentionTap(inner_model, "middle")
with tap.recording(rows=x.shape[0]) as seen:
    inner_model(x, sigma)
seen.saliency()                                                # (b, h', w')
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ksag.attention.checker import Checker, only_call
from ksag.attention.edit import attended, replace_by_head, replace_merged, with_grid
from ksag.attention.families import Attention, sdpa
from ksag.attention.families.diffusers import attention_backend
from ksag.attention.families.family import Grid
from ksag.attention.find import WATCHERS, find_attention, hint
from ksag.attention.hooks import described_arguments, sources
from ksag.attention.visit import Edit, Formula, Visit
from ksag.model.compiled import Around
from ksag.model.copied import copied, remove_copied_hooks
from ksag.model.threads import PerThread


class AttentionTap:
    """Forward hooks on one self-attention layer, idle outside a visit.

    The layer runs as it always does, with its own kernel. As soon as it has attended, the queries and keys of the rows that are
    read become a saliency map, so that neither is kept; for rows that are changed, a formula's result replaces the input of the
    output projection. Each thread has its own visit.

    What was read is checked against what the layer applied (`ksag.attention.checker`). If a family's reading does not explain
    it, the layer's call of scaled_dot_product_attention may.

    A layer of a known family can be compiled, whole, after it was tapped; its first visit runs eagerly. A layer of any other family
    is read by a TorchFunctionMode while it runs, which a compiled graph does not call.

    Args:
        inner_model: the model that holds the layer.
        attention: which one, as in `find_attention`.
        check: whether to check.

    Raises:
        ValueError: no such layer, or none that is supported.
        RuntimeError: a module around or inside the layer was compiled before.
    """

    def __init__(self, inner_model: nn.Module, attention: str | nn.Module = "middle", check: bool = True):
        self.path, self.layer, self.family = find_attention(inner_model, attention)
        self.grid: Grid | None = None
        self.checker = Checker(self.path, self.layer, self.family, check)
        self._hint = hint(inner_model, self.path)
        self._visit: PerThread[Visit | None] = PerThread(lambda: None)
        self._around = Around(inner_model, self.path, self.layer.modules())
        remove_copied_hooks(inner_model)
        self._sources: dict[str, nn.Module] = {}
        self._handles: list[Any] = []
        self._set_hooks()
        WATCHERS.setdefault(self.layer, weakref.WeakSet()).add(self)

    # Its life

    def _set_hooks(self) -> None:
        self._sources, self._hooked = sources(self.layer, self.family), self._submodules()
        # A layer of no known family may resample inside, so that the nearest spatial input before its call can be a submodule's.
        inside = [] if self.family else [module for module in self.layer.modules() if module is not self.layer]
        for module in (*self._around.modules, *inside):
            self._handles.append(module.register_forward_pre_hook(self._see_input, with_kwargs=True))
        self._handles.append(self.layer.register_forward_pre_hook(self._begin_layer, with_kwargs=True))
        for name, module in self._sources.items():
            assert self.family is not None
            if name == self.family.projection:
                self._handles.append(module.register_forward_pre_hook(self._see_projection))
            elif name in self.family.inputs:
                self._handles.append(module.register_forward_pre_hook(functools.partial(self._see_arguments, name)))
            else:
                self._handles.append(module.register_forward_hook(functools.partial(self._see_output, name)))
        self._handles.append(self.layer.register_forward_hook(self._end_layer))

    def _submodules(self) -> list[nn.Module | None]:
        """What changes if a submodule that has a hook is replaced; quicker to look up than these."""
        holders = [self.layer, *(module for module in self.layer._modules.values() if module is not None)]
        return [module for holder in holders for module in holder._modules.values()]

    def _follow_changes(self) -> None:
        """Sets the hooks again if the layer's submodules were replaced: by a LoRA, or fused projections."""
        if self.closed or self._submodules() == self._hooked:
            return
        if self.is_compiled(self._around.root):
            raise RuntimeError(
                f"Submodules of {self.path!r} were replaced after it was wrapped (by a LoRA?), and it is compiled, so that new "
                f"hooks would not run. Wrap the model again, then compile it."
            )
        while self._handles:
            self._handles.pop().remove()
        self._set_hooks()

    def __reduce__(self) -> tuple[Any, ...]:
        return copied, ()

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
        return self._around.is_compiled(inner_model)

    @property
    def to_check(self) -> bool:
        """Whether the next visit has to run eagerly, so that it can be checked in full."""
        if torch.compiler.is_dynamo_compiling() or not self.checker.wanted:
            return False
        code_path = self.checker.code_path
        return self.checker.in_full or (code_path is not None and code_path[0] != self._parts())

    # A visit

    def begin_call(self) -> None:
        """A guided call begins, with one or more visits."""
        if not torch.compiler.is_dynamo_compiling():
            self.checker.begin_call()

    def begin(self, visit: Visit) -> None:
        """From now on, what goes through the layer in this thread belongs to the visit."""
        if not torch.compiler.is_dynamo_compiling():
            self._follow_changes()
        self._visit.set(visit)

    def end(self, visit: Visit) -> None:
        """The visit is over, whether it went well or not."""
        visit.stop()
        self._visit.set(None)

    def visit(self, read: int = 0, edits: Sequence[tuple[int, int, Formula]] = (), dims: int = 2) -> Visit:
        """What one pass asks of this layer; see `Visit`."""
        return Visit(self.path, read, [Edit(*edit) for edit in edits], dims)

    @contextlib.contextmanager
    def _inside(self, visit: Visit) -> Iterator[Visit]:
        self.begin_call()
        try:
            self.begin(visit)
            yield visit
        finally:
            self.end(visit)

    def recording(self, rows: int, dims: int = 2) -> contextlib.AbstractContextManager[Visit]:
        """Reads the first `rows` samples that go through the layer inside the block; then `.saliency()` has their maps."""
        return self._inside(self.visit(rows, dims=dims))

    @contextlib.contextmanager
    def changing(self, start: int, stop: int, formula: Formula, dims: int = 2) -> Iterator[None]:
        """Inside the block, `formula` replaces the attention of samples `start` to `stop`, counted as they go through the layer.

        Raises:
            RuntimeError: at the end of the block, if fewer went through.
        """
        with self._inside(self.visit(edits=[(start, stop, formula)], dims=dims)) as visit:
            yield
        visit.finish()

    def _current(self) -> Visit | None:
        visit = self._visit.get()
        return visit if visit is not None and visit.missing > 0 else None

    # What the hooks see

    def _see_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit = self._current()
        if visit is not None and (visit.watch is None or not visit.watch.calls):
            visit.enter(module, args, kwargs, self.family)

    def _begin_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit = self._visit.get()
        if visit is not None:
            visit.begin_layer()
            if visit.missing > 0:
                self._start(visit, described_arguments(args, kwargs))

    def _start(self, visit: Visit, arguments: tuple[Any, ...] | None) -> None:
        """The layer begins to attend; without arguments if something around it calls its parts one by one."""
        visit.stop()  # a model may have caught an error in the middle of the layer, and run it again
        visit.started = True
        if not torch.compiler.is_dynamo_compiling():
            visit.checking = self.checker.begin(self._parts(), arguments)
        visit.through_sdpa = self.checker.through_sdpa
        if visit.checking or visit.through_sdpa:
            at_call = functools.partial(self._see_call, visit) if self.checker.only_sdpa else None
            visit.watch = sdpa.WatchSDPA(at_call)
            visit.watch.__enter__()

    def _parts(self) -> tuple[Any, ...]:
        """What decides how the layer attends, as far as can be seen from outside."""
        forward = getattr(self.layer.forward, "__func__", self.layer.forward)
        return forward, getattr(self.layer, "processor", None), *self._sources.values()

    def _of_submodule(self) -> Visit | None:
        """The visit that a part of the layer, which just ran, belongs to."""
        visit = self._current()
        if visit is not None and not visit.started:
            self._start(visit, None)
        return visit

    def _keep(self, visit: Visit, x: Tensor) -> Tensor:
        """What a submodule returned: x itself if the layer is known to leave it so, else a copy of it as it is now."""
        if not (visit.checking or self.checker.changes_in_place):
            return x
        copy = x.clone()
        visit.kept.append((copy.detach(), x.detach()))
        return copy

    def _see_output(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if visit := self._of_submodule():
            visit.seen.setdefault(name, []).append(self._keep(visit, output))

    def _see_arguments(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if visit := self._of_submodule():
            visit.seen.setdefault(name, []).append([self._keep(visit, x) for x in args])

    def _see_projection(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The layer has attended, and gives the result to its output projection."""
        visit = self._current()
        if visit is None:
            return None
        family = self.family
        assert family is not None and family.read is not None
        read = self._read_call(visit) if visit.through_sdpa else family.read(self.layer, visit.seen)
        if read is None:
            idle = [name for name in self._sources if name not in (*visit.seen, family.projection)]
            visit.unread = f"It attended without its submodules {', '.join(idle)}, by which it is read."
            visit.stop()
            return None
        read = with_grid(visit, read)
        if visit.checking:
            read = self.checker.check(visit, read, self._call_of(visit, read), args[0])
        visit.stop()
        self.grid = read.grid
        changed = args[0].clone() if visit.edits else args[0]  # a clone has the other rows and the strides as they were

        def change(part: slice, new: Tensor) -> None:
            replace_merged(changed[part], new, family.merged, read.rows(part))

        attended(visit, read, change)
        return (changed, *args[1:]) if visit.edits else None

    def _see_call(self, visit: Visit, call: sdpa.Call, output: Tensor) -> Tensor:
        """A layer that is read through its call of scaled_dot_product_attention has attended."""
        read = with_grid(visit, self._read_call(visit))
        self.grid, self.checker.status = read.grid, "checked"  # it attends with what it passes
        changed = output.clone() if visit.edits else output
        by_head = changed.view(read.q.shape[0], -1, *changed.shape[-2:])

        def change(part: slice, new: Tensor) -> None:
            replace_by_head(by_head[part], new, read.rows(part))

        attended(visit, read, change)
        return changed

    def _end_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        visit = self._visit.get()
        if visit is not None:
            visit.before = None
        if visit is not None and visit.started:
            if not self.checker.only_sdpa:
                visit.unread = f"Its projection {self.family and self.family.projection} did not run."
            elif visit.watch is None or not visit.watch.calls:
                self._read_call(visit)  # which says what is missing
            visit.stop()

    def _read_call(self, visit: Visit) -> Attention:
        try:
            read = only_call(visit)
        except ValueError as error:
            backend = attention_backend(self.layer)
            if backend is not None and not (visit.watch and visit.watch.calls):
                advice = (
                    f"diffusers' attention backend is {backend!r}; set one of PyTorch's: model.set_attention_backend('native')."
                )
            else:
                advice = f"Name the module around just that one call. {self._hint}"
            raise ValueError(f"{self.path!r} ({type(self.layer).__name__}): attention cannot be read: {error}. {advice}") from None
        if self.family is None or self.family.read:
            return read
        read = replace(read, grid=None, tokens=self.family.tokens)
        return sdpa.image_last(read) if self.family.ragged else read

    def _call_of(self, visit: Visit, read: Attention) -> Attention | None:
        """The layer's only call of scaled_dot_product_attention, if it made one of the same tokens as `read`."""
        try:
            call = only_call(visit)
        except ValueError:
            return None
        return replace(call, grid=read.grid, tokens=read.tokens)
