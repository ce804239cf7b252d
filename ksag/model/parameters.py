"""The checks of the settings: each returns the value as it is kept, or raises a ValueError that says what was expected.

>>> sag_scale("strong")
Traceback (most recent call last):
ValueError: sag_scale must be a number, got the str 'strong'.
"""

import math
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


def described(value: Any) -> str:
    """
    >>> described([1.0]), described(None)
    ('the list [1.0]', 'None')
    """
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def number(name: str, value: Any) -> float:
    """Takes Python's and NumPy's real numbers.

    Raises:
        ValueError: anything else.
    """
    # type() first, because Dynamo sees a number that varies from call to call as no instance of anything
    if type(value) not in (int, float):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            as_number = ": give its .item()" if getattr(value, "ndim", None) == 0 else ""
            raise ValueError(f"{name} must be a number, got {described(value)}{as_number}.")
        value = float(value)
    elif type(value) is int and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must be a number that a float can hold, got an int of {value.bit_length()} bits.")
    found: float = value
    return found


def finite(name: str, value: Any) -> float:
    found = number(name, value)
    if not -math.inf < found < math.inf:  # math.isfinite cannot be compiled for a value that varies
        raise ValueError(f"{name} must be a finite number, got {value}.")
    return found


def scale(value: Any, name: str = "scale") -> float | Tensor:
    if isinstance(value, nn.Parameter):
        raise ValueError(f"{name} must be a number, or a tensor (b,), got an nn.Parameter: give its .detach().")
    if isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point():
        return value
    return finite(name, value)


def sag_scale(value: Any) -> float | Tensor:
    return scale(value, "sag_scale")


def every(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"every=n computes the direction every n-th call, n = 1 or more, got {described(value)}.")
    return int(value)


def blur_sigma(value: Any) -> float:
    found = finite("blur_sigma", value)
    if found < 0:
        raise ValueError(f"blur_sigma is a standard deviation in latent pixels, 0 (no blur) or more, got {value}.")
    return found


def seg_blur_sigma(value: Any) -> float:
    found = number("blur_sigma", value)
    if not found >= 0:
        raise ValueError(f"blur_sigma is a standard deviation in tokens, 0 (no blur) or more, or inf for the mean, got {value}.")
    return found


def mask_threshold(value: Any) -> float:
    return finite("mask_threshold", value)


def blur_kernel_size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1 or value % 2 == 0:
        raise ValueError(f"blur_kernel_size must be an odd number of latent pixels, such as 9, got {described(value)}.")
    return int(value)


def sigma_range(value: Any) -> tuple[float, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"sigma_range is (lowest, highest) sigma, got {described(value)}.")
    low, high = (number("each end of sigma_range", end) for end in value)
    if low < 0:
        raise ValueError(f"sigma_range is (lowest, highest) sigma, which is 0 or more, got {low} as the lowest.")
    if low != low or high != high:
        raise ValueError(f"sigma_range is (lowest, highest) sigma, two numbers, got {(low, high)}.")
    if low > high:
        raise ValueError(f"sigma_range is (lowest, highest) sigma, got {(low, high)}: give {(high, low)}?")
    return low, high


def cfg_rule(value: Any) -> Any:
    if not callable(value) or isinstance(value, type):
        raise ValueError(
            f"cfg_rule is a function of (u, g, cond_scale, x, sigma), such as ksag.cfg.plain or ksag.cfg.apg(), "
            f"got {described(value)}."
        )
    return value


def cond_key(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"cond_key is the keyword under which inner_model takes cond, or None, got {described(value)}.")
    return value


def names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"shared_kwargs is a list of keywords, such as ['pos_embed'], got {described(value)}.")
    return tuple(value)


def flag(name: str) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} is True or False, got {described(value)}.")
        return value

    return check


CHECKS: dict[str, Callable[[Any], Any]] = {
    "cfg_rule": cfg_rule,
    "cond_key": cond_key,
    "batch_cond": flag("batch_cond"),
    "shared_kwargs": names,
}
"""The settings of a `GuidedDenoiser` itself → their checks."""
