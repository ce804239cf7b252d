"""cond and uncond in any nesting become one batch, and what comes out is what went in."""

from collections import OrderedDict, defaultdict
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from ksag.model.conditioning import check, join, joinable, leaves, repeat, transform, unshared


def nested(fill: float, tokens: int = 7):
    return {
        "c_crossattn": [torch.full((2, tokens, 4), fill)],
        "c_concat": (torch.full((2, 1, 8, 8), fill),),
        "added_cond_kwargs": {"text_embeds": torch.full((2, 3), fill), "scale": 1.5},
        "nothing": None,
    }


@pytest.mark.parametrize("n", [1, 2, 3])
def test_joins_any_number_of_any_nesting(n):
    joined = join(*(nested(float(i)) for i in range(n)))
    assert joined["c_crossattn"][0].shape == (2 * n, 7, 4)
    assert torch.equal(joined["c_crossattn"][0][:, 0, 0], torch.arange(float(n)).repeat_interleave(2))
    assert isinstance(joined["c_concat"], tuple) and joined["c_concat"][0].shape == (2 * n, 1, 8, 8)
    assert joined["added_cond_kwargs"]["text_embeds"].shape == (2 * n, 3)
    assert joined["added_cond_kwargs"]["scale"] == 1.5 and joined["nothing"] is None


class Pair(NamedTuple):
    text: torch.Tensor
    image: torch.Tensor


def counts():
    counts = defaultdict(list)
    counts["text"] = torch.ones(2, 3)
    return counts


@pytest.mark.parametrize(
    "tree",
    [
        Pair(torch.ones(2, 3), torch.ones(2, 4)),
        UNet2DOutput(sample=torch.ones(2, 3)),  # a ModelOutput
        OrderedDict(text=torch.ones(2, 3)),
        MappingProxyType({"text": torch.ones(2, 3)}),
        counts(),
        {"mixed": torch.ones(2, 3), 1: torch.ones(2, 3)},
        [(), {}, [torch.ones(2, 3)]],
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_containers_come_back_as_what_they_were(tree):
    joined = join(tree, tree)
    assert type(joined) is type(tree) and joined is not tree
    assert [place for place, _ in leaves(joined)] == [place for place, _ in leaves(tree)]
    for (_, leaf), (_, twice) in zip(leaves(tree), leaves(joined), strict=True):
        assert torch.equal(twice, torch.cat([leaf, leaf]))
    if isinstance(tree, UNet2DOutput):
        assert joined.sample.shape == (4, 3)
    if isinstance(tree, defaultdict):
        assert joined["new"] == []


def test_transform_takes_the_leaves_in_order():
    seen = []
    transform(seen.append, {"b": [1, (2,)], "a": 3})
    assert seen == [1, 2, 3] == [leaf for _, leaf in leaves({"b": [1, (2,)], "a": 3})]


def test_unshared_shares_the_leaves_alone():
    tree = nested(0.0)
    own = unshared(tree)
    own["c_crossattn"].pop()
    own["added_cond_kwargs"].clear()
    assert len(tree["c_crossattn"]) == 1 and len(tree["added_cond_kwargs"]) == 2
    assert own["c_concat"][0] is tree["c_concat"][0]


def test_unequal_tokens_are_not_joinable_but_valid():
    check(nested(0.0, 77), nested(1.0, 154), batch=2)
    assert joinable(nested(0.0), nested(1.0), nested(2.0))
    assert not joinable(nested(0.0, 77), nested(1.0, 154)) and not joinable(nested(0.0), nested(1.0), nested(1.0, 154))


def test_the_order_of_keys_does_not_matter():
    a, b = torch.zeros(2, 3), torch.zeros(2, 5)
    assert joinable({"a": a, "b": b}, {"b": b, "a": a}) and not joinable({"a": a, "b": b}, {"b": a, "a": b})


@pytest.mark.parametrize(
    ("uncond", "cond", "message"),
    [
        ({"a": torch.zeros(2, 3)}, {"b": torch.zeros(2, 3)}, r"cond\['b'\] is a tensor .*, and uncond has nothing there"),
        ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 3), 1: 5}, r"cond\[1\] is the int 5, and uncond has nothing there"),
        ({"a": torch.zeros(2, 3), 1: 5}, {"a": torch.zeros(2, 3)}, r"uncond\[1\] is the int 5, and cond has nothing there"),
        ([torch.zeros(2, 3)], [torch.zeros(2, 3)] * 2, r"cond\[1\] is a tensor of shape \(2, 3\), and uncond has nothing there"),
        (torch.zeros(2, 3), [torch.zeros(2, 3)], r"cond\[0\] is a tensor of shape \(2, 3\), and uncond has nothing there"),
        ({"a": {"scale": 1.0}}, {"a": {"scale": 2.0}}, r"uncond\['a'\]\['scale'\] is the float 1.0, cond.* is the float 2.0"),
        ([torch.zeros(2, 3)], [1.0], r"uncond\[0\] is a tensor of shape \(2, 3\), cond\[0\] is the float 1.0"),
        ([np.zeros(3)], [np.zeros(3)], r"uncond\[0\] is the ndarray array"),
        (torch.zeros(2, 3), torch.zeros(3, 3), r"cond has shape \(3, 3\), but the latent is a batch of 2"),
        (torch.zeros(1, 3), torch.zeros(2, 3), r"uncond has shape \(1, 3\), but the latent is a batch of 2"),
        ([torch.tensor(1.0)], [torch.tensor(1.0)], r"cond\[0\] has shape \(\)"),
    ],
)  # fmt: skip
def test_a_mismatch_is_named(uncond, cond, message):
    with pytest.raises(ValueError, match=message):
        check(uncond, cond, batch=2)


def test_repeat_repeats_what_has_a_row_per_sample_and_is_not_shared():
    t = torch.arange(6.0).view(2, 3)
    kwargs = {"mask": t, "table": torch.zeros(5, 3), "flag": True, "nested": [t], "shared": t}
    out = repeat(kwargs, batch=2, times=3, shared=("shared",))
    assert torch.equal(out["mask"], torch.cat([t, t, t])) and torch.equal(out["nested"][0], torch.cat([t, t, t]))
    assert out["table"].shape == (5, 3) and out["flag"] is True and out["shared"] is t
