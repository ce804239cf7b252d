"""A hook on any module that replaces its output for some rows of the batch."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ksag.model.compiled import Around
from ksag.model.conditioning import leaves, transform
from ksag.model.copied import copied, remove_copied_hooks
from ksag.model.threads import PerThread

Replace: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]
"""A module's positional arguments, keywords and output, for some rows of the batch → the new output for them."""


class ModuleVisit:
    """One pass through a module: for which rows (start, stop) its output is replaced, and how many have gone through."""

    def __init__(self, path: str, edits: Sequence[tuple[int, int, Replace]]):
        self.path, self.edits, self.done = path, edits, 0

    def finish(self) -> None:
        """Raises a RuntimeError if the module did not run for all rows."""
        total = max(stop for _, stop, _ in self.edits)
        if self.done < total:
            raise RuntimeError(f"{self.path!r} ran for {self.done} of {total} samples while inner_model ran.")


class ModuleTap:
    """A forward hook on one module, idle outside a visit; it has the interface of `ksag.attention.tap.AttentionTap`.

    Args:
        inner_model: the model that holds the module.
        path: the module's dotted path in it.

    Raises:
        ValueError: no such module.
        RuntimeError: a module around it was compiled before.
    """

    def __init__(self, inner_model: nn.Module, path: str):
        names = [name for name, _ in inner_model.named_modules() if name == path or name.endswith(f".{path}")]
        if len(names) != 1:
            found = f"could be any of {', '.join(names)}" if names else "does not exist"
            raise ValueError(f"modules= names {path!r}, which {found} in {type(inner_model).__name__}. Give the whole path.")
        self.path = names[0]
        self._around = Around(inner_model, self.path)
        remove_copied_hooks(inner_model)
        self._visit: PerThread[ModuleVisit | None] = PerThread(lambda: None)
        self._handle = inner_model.get_submodule(self.path).register_forward_hook(self._replace, with_kwargs=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return copied, ()

    to_check = False

    def visit(self, read: int, edits: Sequence[tuple[int, int, Replace]], dims: int) -> ModuleVisit:
        return ModuleVisit(self.path, edits)

    def is_compiled(self, inner_model: nn.Module) -> bool:
        return self._around.is_compiled(inner_model)

    def begin_call(self) -> None:
        """Nothing is counted here."""

    def begin(self, visit: ModuleVisit) -> None:
        self._visit.set(visit)

    def end(self, visit: ModuleVisit) -> None:
        self._visit.set(None)

    def close(self) -> None:
        self._handle.remove()

    def _replace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        visit = self._visit.get()
        if visit is None:
            return None
        n = next(leaf.shape[0] for _, leaf in leaves(output) if isinstance(leaf, Tensor))
        for first, end, replace in visit.edits:
            start, stop = max(first - visit.done, 0), min(end - visit.done, n)
            if start < stop:
                given = (_rows(tree, start, stop, n) for tree in (args, kwargs, output))
                output = transform(lambda new, old, a=start, b=stop: _replaced(new, old, a, b, n), replace(*given), output)
        visit.done += n
        return output


def _rows(tree: Any, start: int, stop: int, batch: int) -> Any:
    """The rows of every tensor with the batch's number of rows."""
    return transform(lambda t: t[start:stop] if isinstance(t, Tensor) and t.ndim and t.shape[0] == batch else t, tree)


def _replaced(new: Any, old: Any, start: int, stop: int, batch: int) -> Any:
    if not isinstance(old, Tensor) or not old.ndim or old.shape[0] != batch:
        return old
    return torch.cat([old[:start], new.to(old.dtype), old[stop:]])
