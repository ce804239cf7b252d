"""A keyword that the model does not take → an error that names those that it takes."""

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

REFUSED = re.compile(r"(?:^|\.)(\w+)\.(\w+)\(\) got an unexpected keyword argument '(\w+)'")
"""Python's own words, with the class, the method and the keyword."""

LIKELY = re.compile(r"(?<!aug_)cond|encoder_hidden_states|context|class|label|^y$|^c$")
"""How models call what they are conditioned on. (aug_cond is about the training pictures.)"""


@contextlib.contextmanager
def explained(inner_model: nn.Module, cond: Any, cond_key: str | None) -> Iterator[None]:
    """Where the model refuses the keyword of its conditioning, an error that says which to give.

    Args:
        inner_model: the model that the block calls.
        cond: its conditioning.
        cond_key: the keyword; None if cond is a dict of keywords.
    """
    try:
        yield
    except TypeError as error:
        found = REFUSED.search(str(error))
        given = (cond if cond_key is None else [cond_key]) if cond is not None else []
        if found is None or found[3] not in given:
            raise
        raise TypeError(_hint(inner_model, cond, cond_key, *found.groups())) from error


def _hint(inner_model: nn.Module, cond: Any, cond_key: str | None, name: str, method: str, keyword: str) -> str:
    keywords = _keywords(inner_model, name, method)
    takes = f"It takes {', '.join(keywords)}. " if keywords else ""
    if cond_key is None:
        return f"cond has the key {keyword!r}, which {name} does not take as a keyword. {takes}Name the keys of cond and uncond so."
    likely = next((repr(keyword) for keyword in keywords if LIKELY.search(keyword)), "...")
    advice = "cond_key=None, since cond is a dict of keywords" if isinstance(cond, Mapping) else f"cond_key={likely}"
    return f"{name} does not take its conditioning as {keyword!r}. {takes}Make the SAGDenoiser with {advice}."


def _keywords(inner_model: nn.Module, name: str, method: str) -> list[str]:
    """What that method of the module takes besides the latent and the noise level."""
    for module in inner_model.modules():
        if any(base.__name__ == name for base in type(module).__mro__) and hasattr(module, method):
            others = list(inspect.signature(getattr(module, method)).parameters.values())[2:]
            return [p.name for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return []
