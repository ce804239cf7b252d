"""A model that refuses the keyword of its conditioning → an error that says which setting names it."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def explained(cond: Any, cond_key: str | None) -> Iterator[None]:
    """Adds to a TypeError about the keyword of the conditioning how that keyword is set.

    Args:
        cond: the call's conditioning.
        cond_key: the keyword; None if cond is a dict of keywords.
    """
    try:
        yield
    except TypeError as error:
        given = [] if cond is None else cond if cond_key is None else [cond_key]
        if "unexpected keyword argument" not in str(error) or not any(f"{key!r}" in str(error) for key in given):
            raise
        advice = "Rename the key in cond and uncond" if cond_key is None else "Set cond_key= to the keyword that inner_model takes"
        also = (
            " (cond is a dict: if its keys are inner_model's keywords, set cond_key=None)"
            if isinstance(cond, dict) and cond_key
            else ""
        )
        raise TypeError(f"{error}: inner_model does not take its conditioning under this name. {advice}{also}.") from error
