"""The hooks that a wrapper's directions need: each layer has one tap, however many directions use it."""

import contextlib
from collections.abc import Sequence

from torch import nn

from ksag.attention.find import find_attention
from ksag.attention.tap import AttentionTap
from ksag.guidance.direction import Direction
from ksag.model.module_edit import ModuleTap


class Hooks:
    """
    Args:
        inner_model: what is hooked.
        directions: what needs the hooks.
        check: whether to check what is read.

    Raises:
        ValueError: no such layer or module; no hook is left then.
    """

    def __init__(self, inner_model: nn.Module, directions: Sequence[Direction], check: bool):
        by_layer: dict[nn.Module, AttentionTap] = {}
        by_path: dict[str, ModuleTap] = {}
        self.of: list[tuple[list[AttentionTap], list[ModuleTap]]] = []
        """For each direction, the taps on its attention layers and on its modules."""
        self.closed = False
        with contextlib.ExitStack() as if_it_fails:
            for direction in directions:
                for layer in direction.layers:
                    _, module, _ = find_attention(inner_model, layer)
                    if module not in by_layer:
                        by_layer[module] = AttentionTap(inner_model, module, check)
                        if_it_fails.callback(by_layer[module].close)
                for path in direction.modules:
                    if path not in by_path:
                        by_path[path] = ModuleTap(inner_model, path)
                        if_it_fails.callback(by_path[path].close)
                layers = [by_layer[find_attention(inner_model, layer)[1]] for layer in direction.layers]
                self.of.append((list(dict.fromkeys(layers)), [by_path[path] for path in direction.modules]))
            if_it_fails.pop_all()
        self.attention = list(by_layer.values())
        self.all: list[AttentionTap | ModuleTap] = [*self.attention, *by_path.values()]

    @property
    def status(self) -> str:
        """Whether what the hooks read was checked."""
        found = {tap.checker.status for tap in self.attention}
        return "closed" if self.closed else found.pop() if len(found) == 1 else "not checked yet"

    def begin_run(self) -> None:
        """The next guided call is a run's first."""
        for tap in self.attention:
            tap.checker.begin_run()

    def close(self) -> None:
        """Removes every hook. Calling it twice does no harm."""
        self.closed = True
        for tap in self.all:
            tap.close()
