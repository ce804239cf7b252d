"""When a layer is checked, and what follows from the result.

A layer is checked in full at its first visit, and whenever its code path is seen to change: its forward, its processor, or which
arguments it is given. A part of its queries is checked again at the first call of each run that uses the layer and at the 2nd, 4th,
8th, 16th and every 32nd of these, because a processor can change through one of its attributes, which is not visible from outside.
"""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ksag.attention.check import SAMPLED_QUERIES, Pending, error, is_due, unmerged
from ksag.attention.families import Attention, Family, sdpa
from ksag.attention.families.family import resolve
from ksag.attention.visit import Visit

Status: TypeAlias = Literal["not checked yet", "checked", "cannot be checked"]


class Checker:
    """Checks what is read of one layer of a known family.

    Args:
        path: the layer's, for messages.
        layer: the layer.
        family: what reads it; None if only its call of scaled_dot_product_attention does, which needs no check.
        wanted: whether to check.
    """

    def __init__(self, path: str, layer: nn.Module, family: Family | None, wanted: bool):
        self.path, self.layer, self.family = path, layer, family
        self.only_sdpa = family is None or family.read is None or resolve(layer, family.projection) is None
        """Whether nothing but the layer's call of scaled_dot_product_attention can be read."""
        self.wanted = wanted and not self.only_sdpa
        self.status: Status = "not checked yet"
        self.through_sdpa = self.only_sdpa
        """Whether the layer's own call of scaled_dot_product_attention says what it attends with."""
        self.changes_in_place = False
        """Whether the layer changes what its projections returned."""
        self.code_path: tuple[Any, Any] | None = None
        self._calls = self._of_run = self._found_right = 0
        self._pending = Pending()

    @property
    def in_full(self) -> bool:
        """Whether the next check is one of all queries, which the host waits for."""
        return self.wanted and self.status == "not checked yet"

    def begin_run(self) -> None:
        """The next call is a run's first."""
        self._of_run = 0

    def begin_call(self) -> None:
        """Counts a guided call, and raises a ValueError if an earlier check has failed since."""
        self._calls += 1
        self._of_run += 1
        if failed := self._pending.failed():
            self._refuse(*failed)

    def begin(self, parts: tuple[Any, ...], arguments: Any) -> bool:
        """Whether to check what is read now, of a layer that consists of `parts` and is given `arguments`."""
        if (parts, arguments) != self.code_path:
            self.code_path, self.status = (parts, arguments), "not checked yet"
            self.through_sdpa = self.only_sdpa
        if not self.wanted or self.status == "cannot be checked":
            return False
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        return self.in_full or is_due(self._of_run)

    def check(self, visit: Visit, read: Attention, call: Attention | None, applied: Tensor) -> Attention:
        """`read`, or `call` if that explains what the layer applied and `read` does not.

        Args:
            visit: the pass, which says how many rows matter.
            read: what was read, of all rows.
            call: the layer's only call of scaled_dot_product_attention, if there was one.
            applied: what the layer gave to its output projection.

        Raises:
            ValueError: neither explains it.
        """
        assert self.family is not None
        if read.v is None or type(applied) is not Tensor:  # a tensor without data, say
            self.status = "cannot be checked"
            return read
        rows = slice(0, visit.missing)
        output = unmerged(applied.detach()[rows], self.family.merged, read.q.shape[1])
        if output is not None and read.tokens != "all":
            output = output[:, :, read.of_image(output.shape[2])]
        own = read.detach().rows(rows).image_queries
        if not self.in_full:
            self._check_some(own, output)
            return read
        found = float(error(own, output, self.family.computes_in))
        if found != found:
            return read  # all is NaN, and the next call may tell
        if found > 1 and call is not None and _has_own_values(call.rows(rows), own):
            of_call = call.detach().rows(rows).image_queries
            if float(error(of_call, output, self.family.computes_in)) <= 1:
                self._passed()
                self.through_sdpa = True
                return call
        if found <= 1:
            self._passed()
            self.changes_in_place = any(not torch.equal(copy, now) for copy, now in visit.kept)
            return read
        dropout = resolve(self.layer, self.family.dropout)
        if getattr(dropout, "p", 0) > 0 and (dropout.training or self.family.drops_in_eval):
            self.status = "cannot be checked"
            return read  # what was applied is what was read, thinned out at random
        self._refuse(self._calls, found)
        return read

    def _check_some(self, read: Attention, applied: Tensor | None) -> None:
        stride = max(1, read.q.shape[2] // SAMPLED_QUERIES)
        some = slice(self._calls % stride, None, stride)
        assert self.family is not None
        applied = None if applied is None else applied[:, :, some]
        self._pending.add(self._calls, error(read.queries(some), applied, self.family.computes_in))
        if failed := self._pending.failed():
            self._refuse(*failed)
        self._found_right = self._calls

    def _passed(self) -> None:
        self.status, self._found_right = "checked", self._calls

    def _refuse(self, call: int, found: float) -> None:
        assert self.family is not None
        late = ""
        if self.status == "checked":
            late = (
                f"This was found at guided call {call} of those that use this layer; it was right at call "
                f"{min(self._found_right, call - 1)}, so calls since then may be affected. "
            )
        self.status = "not checked yet"
        raise ValueError(
            f"{self.path!r} ({type(self.layer).__name__}) is read as {self.family.name}, but it applied another attention than its "
            f"projections give: they differ by {found:.0f} times what rounding explains. {late}Likely cause: "
            f"{self._likely_cause()}. Name another layer as attention=, or pass check_attention=False to take it as it is."
        )

    def _likely_cause(self) -> str:
        _, arguments = self.code_path or (None, None)
        if masks := [name for name, _ in arguments or () if "mask" in str(name)]:
            return f"its argument {' and '.join(masks)}"
        if (processor := getattr(self.layer, "processor", None)) is not None:
            return f"its processor, a {type(processor).__name__}, attends in a different way"
        return "a patch, option or replaced forward that changes its queries, keys or values"


def _has_own_values(call: Attention, own: Attention) -> bool:
    """Whether a call attends with the sample's own tokens: a mask, a scale or a rotation leaves the values as they are, and keys of
    other samples bring their values with them."""
    assert call.v is not None and own.v is not None
    return call.v.shape == own.v.shape and torch.allclose(call.v.float(), own.v.float(), rtol=0.01, atol=0.01)


def only_call(visit: Visit) -> Attention:
    """What the layer's only call of scaled_dot_product_attention attends with.

    Raises:
        ValueError: there was none, or more than one, or it was no self-attention.
    """
    calls = visit.watch.calls if visit.watch else []
    if len(calls) != 1:
        raise ValueError(f"it calls scaled_dot_product_attention {len(calls)} times while it runs, instead of once")
    return sdpa.read(calls[0], visit.batch, visit.spatial)
