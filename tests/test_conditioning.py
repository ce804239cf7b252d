import pytest
import torch

from ksag.conditioning import batchable, check, concatenate, repeat


def nested(fill: float, tokens: int = 7):
    return {
        "c_crossattn": [torch.full((2, tokens, 4), fill)],
        "c_concat": (torch.full((2, 1, 8, 8), fill),),
        "added_cond_kwargs": {"text_embeds": torch.full((2, 3), fill), "scale": 1.5},
        "nothing": None,
    }


def test_concatenates_any_nesting():
    both = concatenate(nested(0.0), nested(1.0))
    assert both["c_crossattn"][0].shape == (4, 7, 4)
    assert both["c_crossattn"][0][:2].eq(0).all() and both["c_crossattn"][0][2:].eq(1).all()
    assert isinstance(both["c_concat"], tuple) and both["c_concat"][0].shape == (4, 1, 8, 8)
    assert both["added_cond_kwargs"]["text_embeds"].shape == (4, 3)
    assert both["added_cond_kwargs"]["scale"] == 1.5 and both["nothing"] is None


def test_unequal_tokens_are_not_batchable_but_valid():
    check(nested(0.0, 77), nested(1.0, 154), batch=2)
    assert batchable(nested(0.0), nested(1.0))
    assert not batchable(nested(0.0, 77), nested(1.0, 154))


@pytest.mark.parametrize(
    ("uncond", "cond", "message"),
    [
        ({"a": torch.zeros(2, 3)}, {"b": torch.zeros(2, 3)}, r"uncond has the keys \['a'\], cond has \['b'\]"),
        ([torch.zeros(2, 3)], [torch.zeros(2, 3)] * 2, "uncond has 1 entries, cond has 2"),
        (torch.zeros(2, 3), [torch.zeros(2, 3)], r"uncond is a tensor of shape \(2, 3\), cond is \["),
        ({"a": {"scale": 1.0}}, {"a": {"scale": 2.0}}, r"uncond\['a'\]\['scale'\] is 1.0, cond\['a'\]\['scale'\] is 2.0"),
        (torch.zeros(2, 3), torch.zeros(3, 3), r"cond has shape \(3, 3\), but the latent is a batch of 2"),
        (torch.zeros(1, 3), torch.zeros(2, 3), r"uncond has shape \(1, 3\), but the latent is a batch of 2"),
        ([torch.tensor(1.0)], [torch.tensor(1.0)], r"cond\[0\] has shape \(\)"),
    ],
)
def test_a_mismatch_is_named(uncond, cond, message):
    with pytest.raises(ValueError, match=message):
        check(uncond, cond, batch=2)


def test_repeat_doubles_what_has_a_row_per_sample():
    t = torch.arange(6.0).view(2, 3)
    out = repeat({"mask": t, "table": torch.zeros(5, 3), "flag": True, "nested": [t]}, batch=2)
    assert torch.equal(out["mask"], torch.cat([t, t])) and torch.equal(out["nested"][0], torch.cat([t, t]))
    assert out["table"].shape == (5, 3) and out["flag"] is True
