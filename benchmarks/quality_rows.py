"""What the quality benchmark measures: a row, its cost, and the file that keeps the results."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import k_diffusion as K
import torch
from torch import Tensor

Settings = tuple[tuple[str, Any], ...]
Directions = tuple[tuple[str, Settings], ...]
Result = dict[str, Any]

SCHEDULE = {"sigma_min": 0.32, "sigma_max": 160.0, "rho": 7.0}
"""Karras's schedule for the bundled model."""
TWO_CALLS = {"heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"}
FLOWS = ("emoji-flow", "emoji-flow-2")
"""Two trainings of the transformer."""
SPEED = {"emoji": 22_000, **dict.fromkeys(FLOWS, 20_000)}
"""Each model, and the evaluations a second to expect of one H200."""


def frozen(value: Any) -> Any:
    """Dicts as sorted tuples of pairs, and lists as tuples, for a key.

    >>> frozen({"scale": 1.0, "attention": ["a", "b"]})
    (('attention', ('a', 'b')), ('scale', 1.0))
    """
    if isinstance(value, dict):
        return tuple(sorted((name, frozen(part)) for name, part in value.items()))
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


USUAL: Settings = frozen(SCHEDULE)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is sampled.

    Attributes:
        model: "emoji", "emoji-flow" or "emoji-flow-2".
        schedule: arguments of `get_sigmas_karras`; nothing for steps uniform in t.
        directions: pairs of a class in `ksag` and its settings; nothing for plain sampling.
        cond_scale: of classifier-free guidance by category; None for no category.
    """

    model: str = "emoji"
    sampler: str = "euler"
    steps: int = 24
    schedule: Settings = USUAL
    directions: Directions = ()
    cond_scale: float | None = None
    seeds: int = 2
    n: int = 5000

    @classmethod
    def of(cls, result: Result) -> "Row":
        """What a line of quality.jsonl says was sampled."""
        return cls(**{name: frozen(value) for name, value in result["row"].items()})

    @cached_property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def evaluations(self) -> float:
        """Of the network for each sample, as far as can be told in advance."""
        two = self.sampler in TWO_CALLS
        calls = 40 if self.sampler == "dpm_adaptive" else 2 * self.steps - 1 if two else self.steps
        each = 1.0 if self.cond_scale in (None, 1.0) else 2.0
        levels = sigmas(self)[:-1].tolist()
        for _, settings in self.directions:
            low, high = dict(settings).get("sigma_range", (0, math.inf))
            inside = sum(low <= sigma <= high for sigma in levels)
            each += math.ceil(inside / dict(settings).get("every", 1)) / len(levels)
        return calls * each

    @property
    def cost(self) -> float:
        """Seconds that sampling takes on one H200, about."""
        return self.n * self.evaluations / SPEED[self.model]

    @property
    def plain(self) -> "Row":
        return dataclasses.replace(self, directions=())

    @property
    def equal(self) -> "Row":
        """Plain sampling at the same number of evaluations."""
        return dataclasses.replace(self.plain, steps=round(self.steps * self.evaluations / self.plain.evaluations))


def load_results(path: Path) -> dict[str, Result]:
    """The rows that are there, by their keys, but for a line that a kill cut off."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            result = json.loads(line)
            found[json.dumps(result["row"], sort_keys=True)] = result
    return found


def append_result(path: Path, result: Result) -> None:
    before = path.read_bytes() if path.exists() else b""
    start = "\n" if before and not before.endswith(b"\n") else ""  # the line before was cut off
    with open(path, "ab", buffering=0) as file:
        file.write(f"{start}{json.dumps(result)}\n".encode())  # in one write: other processes append too


def sigmas(row: Row, device: str | torch.device = "cpu") -> Tensor:
    """(steps + 1,) noise levels."""
    if row.schedule:
        return K.sampling.get_sigmas_karras(row.steps, **dict(row.schedule), device=device)
    t = torch.linspace(0.999, 0, row.steps + 1, device=device)
    return t / (1 - t)


def to_sample(rows: Iterable[Row]) -> dict[Row, list[int]]:
    """The rows to sample, each with its number of samples and those of the rows that are its first samples.

    >>> [(row.n, sizes) for row, sizes in to_sample([Row(n=2), Row(n=3, steps=8), Row(n=5)]).items()]
    [(5, [2, 5]), (3, [3])]
    """
    sizes: dict[Row, list[int]] = {}
    for row in rows:
        sizes.setdefault(dataclasses.replace(row, n=0), []).append(row.n)
    return {dataclasses.replace(row, n=max(served)): served for row, served in sizes.items()}


def shared_out(rows: Sequence[Row], ranks: int) -> list[list[Row]]:
    """Each process's rows, in their order: a row goes to the process that has least to do so far.

    >>> [len(part) for part in shared_out([Row(n=n) for n in (8, 1, 2, 3, 1)], 2)]
    [1, 4]
    """
    parts: list[list[Row]] = [[] for _ in range(ranks)]
    seconds = [0.0] * ranks
    for row in rows:
        first = seconds.index(min(seconds))
        parts[first].append(row)
        seconds[first] += row.cost
    return parts


def describe(row: Row) -> str:
    condition = "" if row.cond_scale is None else f", cond_scale {row.cond_scale:g}"
    guidance = " + ".join(f"{name}({', '.join(f'{k}={v}' for k, v in s)})" for name, s in row.directions) or "plain"
    return f"{row.model}, {row.sampler}, {row.steps} steps{condition}, seeds {row.seeds}, n {row.n}, {guidance}"
