"""A custom direction for the quality benchmark: away from a prediction that leaves out some of the model's blocks.

Skip layer guidance does the same for Stable Diffusion 3.5. The blocks are residual, so a block's input can replace its output.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

import ksag
from ksag.guidance.direction import Call


def skipped(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """What the block was given. A joint block has two streams, of which its model's last one drops the text's."""
    if isinstance(output, Tensor):
        return args[0]
    return None if output[0] is None else kwargs["encoder_hidden_states"], kwargs["hidden_states"]


class SkipBlock(ksag.Direction):
    """g − p, with p the conditional prediction in which the blocks of these paths are skipped."""

    name = "skip"

    def __init__(
        self, blocks: str | Sequence[str], scale: float, sigma_range: tuple[float, float] = (0.0, math.inf), every: int = 1
    ):
        paths = [blocks] if isinstance(blocks, str) else blocks
        super().__init__(scale, modules=paths, sigma_range=sigma_range, every=every)

    def ask(self, call: Call) -> Sequence[ksag.Ask]:
        return [ksag.Ask(call.x, call.cond, output=skipped)]

    def direction(self, call: Call, answers: Sequence[Tensor]) -> Tensor:
        return call.g - answers[0]
