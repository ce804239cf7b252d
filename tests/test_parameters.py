"""Every value of every parameter gives the right image or a clear error: at construction, assigned later, and per call."""

import inspect
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import ksag
from ksag import cfg
from ksag.model import parameters
from tests import forms
from tests.models import hooks, make_denoiser

PARAMETERS = [n for n in inspect.signature(ksag.SAGDenoiser).parameters if n not in ("inner_model", "attention", "check_attention")]
PER_CALL = ("sag_scale", "blur_sigma", "mask_threshold")

NUMBER = r"must be a number, got "
NOT_NUMBERS = [
    ("strong", NUMBER + "the str 'strong'"),
    ("0.5", NUMBER + "the str '0.5'"),
    ([0.5], NUMBER + r"the list \[0.5\]"),
    (1j, NUMBER + "the complex 1j"),
    (True, NUMBER + "the bool True"),
    (math.nan, "must be a finite number, got nan"),
    (np.float64("nan"), "must be a finite number, got nan"),
    (np.array(0.5), NUMBER + r"the ndarray array\(0.5\): give .*\.item\(\)"),
    (np.array([0.5, 1.0]), NUMBER + r"the ndarray array\(\[0.5, 1. \]\)\.$"),
    (torch.tensor(0.5), NUMBER + r"a tensor of shape \(\): give .*\.item\(\)"),
    (torch.tensor([0.5, 1.0]), NUMBER + r"a tensor of shape \(2,\)"),
    (math.inf, "must be a finite number, got inf"),
    (-math.inf, "must be a finite number, got -inf"),
    (10**400, "must be a number that a float can hold, got an int of 1329 bits"),
]
NONE = (None, NUMBER + "None")  # per call it is "the constructor's"
KERNEL = "blur_kernel_size must be an odd number of latent pixels, such as 9, got "
RANGE = r"sigma_range is \(lowest, highest\) sigma, "
END = "sigma_range must be a number, got "
MALFORMED = {
    "sag_scale": [
        *[case for case in NOT_NUMBERS if not isinstance(case[0], torch.Tensor) or case[0].ndim != 1], NONE,
        (torch.tensor([1, 2]), NUMBER + r"a tensor of shape \(2,\)"), (nn.Parameter(torch.ones(2)), "got an nn.Parameter"),
        (torch.ones(2, 1), NUMBER + r"a tensor of shape \(2, 1\)"),
    ],
    "blur_sigma": [*NOT_NUMBERS, NONE, (-1.0, "0 .no blur. or more, got -1.0"), (-1e-300, "0 .no blur. or more")],
    "mask_threshold": [*NOT_NUMBERS, NONE],
    "blur_kernel_size": [
        (8, KERNEL + "the int 8"), (0, KERNEL), (-3, KERNEL), (9.0, KERNEL + "the float 9.0"), ("9", KERNEL + "the str '9'"),
        (None, KERNEL + "None"), ([9], KERNEL), (True, KERNEL + "the bool True"), (np.int64(8), KERNEL + "the int64 8"),
        (np.array(9), KERNEL), (torch.tensor([9, 9]), KERNEL + r"a tensor of shape \(2,\)"), (math.nan, KERNEL),
    ],
    "sigma_range": [
        ((0.0, 1.0, 2.0), RANGE + r"got the tuple \(0.0, 1.0, 2.0\)"), ((1.0,), RANGE), (("low", "high"), END + "the str 'low'"),
        ("ab", RANGE + "got the str 'ab'"), (None, RANGE + "got None"), (5.0, RANGE + "got the float 5.0"),
        ((-1.0, 2.0), "which is 0 or more, got -1.0"), ((-2.0, -1.0), "which is 0 or more"), 
        ((math.nan, 1.0), RANGE + r"two numbers, got \(nan, 1.0\)"),
        ((0.0, math.nan), RANGE + "two numbers"),
        ((5.0, 1.0), r"got \(5.0, 1.0\): give \(1.0, 5.0\)\?"), ((None, 5.0), END + "None"),
        (((0.0, 1.0), 2.0), END + r"the tuple \(0.0, 1.0\)"), (torch.tensor([0.0, 5.0]), RANGE + r"got a tensor of shape \(2,\)"),
        (np.array([0.0, 5.0]), RANGE + "got the ndarray"), ({0.0: 1, 5.0: 2}, RANGE + "got the dict"),
    ],
    "one_pass": [(1, "one_pass is True or False, got the int 1"), (None, "got None")],
    "every": [
        (0, "every=n computes the direction every n-th call, n = 1 or more, got the int 0"), (-1, "got the int -1"),
        (2.0, "got the float 2.0"), (True, "got the bool True"), (None, "got None"), ("2", "got the str '2'"),
    ],
    "cfg_rule": [(None, r"cfg_rule is a function of .*got None"), ("plain", "got the str 'plain'"), (0.7, "got the float 0.7")],
    "cond_key": [(3, "cond_key is the keyword .*got the int 3"), (["cond"], "got the list"), (b"cond", "got the bytes")],
    "batch_cond": [(0, "batch_cond is True or False, got the int 0"), (None, "got None"), ("False", "got the str 'False'")],
    "shared_kwargs": [("table", "a list of keywords, .*got the str 'table'"), (None, "got None"), ([3], r"got the list \[3\]")],
}  # fmt: skip
CASES = [
    pytest.param(name, value, message, id=f"{name}={type(value).__name__} {value!r}"[:60].replace("\n", " "))
    for name, values in MALFORMED.items()
    for value, message in values
]


class Model(nn.Module):
    """The tiny denoiser, with another keyword for its conditioning."""

    def __init__(self):
        super().__init__()
        self.tiny = forms.tiny()

    def forward(self, x, sigma, text=None):
        return self.tiny(x, sigma, text)


def wrap(denoiser, **options):
    return ksag.SAGDenoiser(denoiser, **{"cond_key": "text", "blur_kernel_size": 5, **options})


def good_call(batch=2):
    x, args = forms.latents(batch)
    return {"x": x * 3, "sigma": torch.full((batch,), 3.0), **args}


def differ(a, b):
    return (a - b).norm() > 1e-3 * b.norm()


# Malformed settings


@pytest.fixture(scope="module")
def guided():
    return wrap(Model())


@pytest.fixture(scope="module")
def expected(guided):
    return guided(**good_call())


def test_every_parameter_has_malformed_values():
    assert MALFORMED.keys() == set(PARAMETERS)


@pytest.mark.parametrize(("name", "value", "message"), CASES)
def test_malformed_at_construction(name, value, message):
    denoiser = Model()
    with pytest.raises(ValueError, match=message):
        wrap(denoiser, **{name: value})
    assert hooks(denoiser) == 0


@pytest.mark.parametrize(("name", "value", "message"), CASES)
def test_malformed_when_assigned_later_leaves_the_old_value(guided, expected, name, value, message):
    before = getattr(guided, name)
    with pytest.raises(ValueError, match=message):
        setattr(guided, name, value)
    assert getattr(guided, name) is before
    assert torch.equal(guided(**good_call()), expected)


@pytest.mark.parametrize(
    ("name", "value", "message"), [case for case in CASES if case.values[0] in PER_CALL and case.values[1] is not None]
)
def test_malformed_per_call(guided, expected, name, value, message):
    with pytest.raises(ValueError, match=message):
        guided(**good_call(), **{name: value})
    assert torch.equal(guided(**good_call()), expected)


@pytest.mark.parametrize("attention", [None, 3, 3.5, [3]])
def test_malformed_attention(attention):
    denoiser = Model()
    with pytest.raises(ValueError, match=r"attention= is 'middle', a path in inner_model, or a module of it, got (None|the )"):
        wrap(denoiser, attention=attention)
    assert hooks(denoiser) == 0


@pytest.mark.parametrize("attention", [(), ["middle", forms.LAYERS[1]]])
def test_sag_reads_one_layer(attention):
    with pytest.raises(ValueError, match=r"SAG reads the attention of one layer, got attention=[\[(].*: name one"):
        wrap(Model(), attention=attention)


# Values that are taken


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [
        ("sag_scale", np.float32(0.75), 0.75),
        ("sag_scale", np.float64(0.75), 0.75),
        ("sag_scale", np.int64(2), 2.0),
        ("sag_scale", Fraction(3, 4), 0.75),
        ("sag_scale", -2, -2.0),
        ("blur_sigma", np.float16(1.5), 1.5),
        ("blur_sigma", 1, 1.0),
        ("blur_sigma", 1e-20, 0.0),
        ("blur_sigma", 1e-40, 0.0),
        ("blur_sigma", 1e-160, 0.0),
        ("blur_sigma", 5e-324, 0.0),
        ("blur_sigma", 1e-3, 0.0),
        ("blur_sigma", 1e9, 1e6),
        ("blur_sigma", 1e300, 1e6),
        ("mask_threshold", np.float32(0.5), 0.5),
        ("mask_threshold", 1, 1.0),
        ("mask_threshold", -1e300, -1.0),
        ("mask_threshold", 1e300, 1e6),
        ("blur_kernel_size", np.int64(3), 3),
        ("blur_kernel_size", np.uint8(3), 3),
        ("sigma_range", [3, 3], (3.0, 3.0)),
        ("sigma_range", (np.float32(0.0), np.float64(2.0)), (0.0, 2.0)),
        ("sigma_range", (math.inf, math.inf), (4.0, 5.0)),
        ("shared_kwargs", ["table"], ("table",)),
    ],
)
def test_taken_wherever_it_is_given(guided, name, value, same):
    with wrap(Model(), **{name: same}) as other:
        expected = other(**good_call())
    before = getattr(guided, name)
    setattr(guided, name, value)
    try:
        assigned = guided(**good_call())
    finally:
        setattr(guided, name, before)
    with wrap(Model(), **{name: value}) as constructed:
        images = [assigned, constructed(**good_call())]
    if name in PER_CALL:
        images.append(guided(**good_call(), **{name: value}))
    for image in images:
        assert image.isfinite().all()
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PER_CALL)
def test_none_per_call_is_the_constructors(guided, expected, name):
    assert torch.equal(guided(**good_call(), **{name: None}), expected)


@pytest.mark.parametrize("name", PER_CALL)
def test_assigned_per_call_and_at_construction_are_the_same(guided, expected, name):
    other = {"sag_scale": -1.5, "blur_sigma": 0.75, "mask_threshold": 0.9}[name]
    per_call = guided(**good_call(), **{name: other})
    assert differ(per_call, expected)
    with wrap(Model(), **{name: other}) as constructed:
        assert torch.equal(constructed(**good_call()), per_call)
    with wrap(Model()) as later:
        setattr(later, name, other)
        assert torch.equal(later(**good_call()), per_call)


# Malformed calls


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *[({"cond_scale": value}, ValueError, "cond_scale " + message) for value, message in [*NOT_NUMBERS, NONE]],
        *[
            ({"cond_scale": value, "uncond": None}, ValueError, "cond_scale " + message)
            for value, message in ((math.nan, "must be a finite number, got nan"), (1j, "must be a number, got the complex 1j"))
        ],
        ({"uncond": None}, ValueError, r"cond_scale=2.0 guides cond away from uncond, and uncond is missing"),
        ({"cond": None}, ValueError, "uncond came without cond"),
        ({"sigma": 3.0}, ValueError, r"each of the 2 samples, shape \(2,\), got the float 3.0: pass sigma \* x.new_ones"),
        ({"sigma": None}, ValueError, "sigma must be a tensor with one noise level .*got None"),
        ({"sigma": torch.tensor(3.0)}, ValueError, r"got a tensor of shape \(\)"),
        ({"sigma": torch.tensor([3.0])}, ValueError, r"got a tensor of shape \(1,\)"),
        ({"sigma": [3.0, 3.0]}, ValueError, r"got the list \[3.0, 3.0\]"),
        ({"sigma": np.array([3.0, 3.0])}, ValueError, "got the ndarray"),
        ({"x": np.zeros((2, 3, 8, 12), np.float32)}, ValueError, r"x must be a latent, .*\(b, c, h, w\).*got the ndarray"),
        ({"x": None}, ValueError, "x must be a latent.*got None"),
        ({"x": torch.zeros(8, 12)}, ValueError, r"x must be a latent.*got a tensor of shape \(8, 12\)"),
        ({"x": torch.zeros(2, 3, 1, 1, 8, 12)}, ValueError, r"got a tensor of shape \(2, 3, 1, 1, 8, 12\)"),
        ({"x": torch.zeros(0, 3, 8, 12)}, ValueError, r"with b at least 1, got a tensor of shape \(0, 3, 8, 12\)"),
        ({"uncond": torch.zeros(3, 4)}, ValueError, r"uncond has shape \(3, 4\), but the latent is a batch of 2"),
        ({"cond": torch.tensor(1.0)}, ValueError, r"cond has shape \(\), but the latent is a batch of 2"),
        ({"cond": "a cat", "uncond": "a dog"}, ValueError, "uncond is the str 'a dog', cond is the str 'a cat'"),
        ({"cond": {"a": torch.zeros(2, 4)}}, ValueError, "both must have the same nesting"),
        ({"cond": {1: torch.zeros(2), "a": 1}, "uncond": {1: torch.zeros(2), None: 1}}, ValueError, "has nothing there: both must"),
        ({"text": torch.zeros(2, 4)}, TypeError, "text came twice: in cond, and as a keyword of its own"),
    ],
)  # fmt: skip
def test_malformed_calls_are_clear_errors_and_leave_nothing(guided, expected, change, error, message):
    with pytest.raises(error, match=message):
        guided(**{**good_call(), **change})
    assert guided.tap._visit.get() is None
    assert torch.equal(guided(**good_call()), expected)


def test_a_batch_of_none_is_a_clear_error_with_everything_to_match(guided):
    empty = {name: value[:0] if isinstance(value, torch.Tensor) else value for name, value in good_call().items()}
    with pytest.raises(ValueError, match=r"with b at least 1, got a tensor of shape \(0, 3, 6, 8\)"):
        guided(**empty)


@pytest.mark.parametrize("cond_scale", [np.float32(2.0), np.float64(2.0), np.int64(2), 2, Fraction(2)])
def test_numbers_of_any_kind_as_cond_scale(guided, expected, cond_scale):
    torch.testing.assert_close(guided(**{**good_call(), "cond_scale": cond_scale}), expected)


class Unpacks(nn.Module):
    """A model whose conditioning is a dict with keys of any type."""

    def __init__(self, key):
        super().__init__()
        self.inner_model, self.key = Model(), key

    def forward(self, x, sigma, cond):
        return self.inner_model(x, sigma, text=cond[self.key])


@pytest.mark.parametrize("key", ["a", 1, None, (0, 1)])
@pytest.mark.parametrize("batch_cond", [True, False])
def test_dict_keys_of_mixed_types_are_taken(expected, key, batch_cond):
    good = good_call()
    for side in "cond", "uncond":
        others = {other: torch.zeros_like(good[side]) for other in ("a", 1, None, (0, 1))}
        good[side] = {**others, key: good[side]}
    result = ksag.SAGDenoiser(Unpacks(key), blur_kernel_size=5, batch_cond=batch_cond)(**good)
    torch.testing.assert_close(result, expected)


def test_keywords_that_are_no_strings_are_a_clear_error():
    good = good_call()
    good["cond"], good["uncond"] = ({"text": good[side], 1: good[side]} for side in ("cond", "uncond"))
    with pytest.raises(TypeError, match="1"):
        wrap(Model(), cond_key=None)(**good)


def test_cond_given_twice_is_a_clear_error_in_a_dict_of_keywords():
    good = good_call()
    cond = good["cond"]
    good["cond"], good["uncond"] = ({"text": good[side]} for side in ("cond", "uncond"))
    guided = wrap(Model(), cond_key=None)
    result = guided(**good)
    with pytest.raises(TypeError, match="text came twice"):
        guided(**good, text=cond)
    assert torch.equal(guided(**good), result)


def test_a_conditioning_may_come_as_a_keyword_alone(guided):
    good = good_call()
    given = {"x": good["x"], "sigma": good["sigma"]}
    assert torch.equal(guided(**given, text=good["cond"]), guided(**given, cond=good["cond"]))


# sigma_range and a batch of mixed sigmas


@pytest.mark.parametrize(
    ("sigma_range", "inside"),
    [
        ((1.0, 4.0), [1, 2]),
        ((3.0, 3.0), [2]),
        ((1.0, 1.0), [1]),
        ((0.0, 0.5), [0]),
        ((0.0, 0.499), []),
        ((3.001, 8.999), []),
        ((9.0, math.inf), [3]),
        ((0.5, 9.0), [0, 1, 2, 3]),
        ((0.0, math.inf), [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("options", [{}, {"batch_cond": False}, {"cfg_rule": cfg.rescale(0.7)}], ids=["", "apart", "rescale"])
def test_each_sample_is_guided_by_its_own_sigma(sigma_range, inside, options):
    call = {**good_call(4), "sigma": torch.tensor([0.5, 1.0, 3.0, 9.0])}
    with wrap(Model(), **options) as everywhere:
        guided, plain = everywhere(**call), everywhere(**call, sag_scale=0.0)
        alone = [
            everywhere(**{name: v[i : i + 1] if isinstance(v, torch.Tensor) else v for name, v in call.items()}) for i in range(4)
        ]
    with wrap(Model(), **options, sigma_range=sigma_range) as ranged:
        result = ranged(**call)
    for i in range(4):
        assert torch.equal(result[i], guided[i] if i in inside else plain[i])
        assert differ(guided[i], plain[i])
        torch.testing.assert_close(alone[i][0], guided[i], rtol=1e-4, atol=1e-4)


def test_a_nan_outside_the_range_stays_with_its_sample():
    call = {**good_call(), "sigma": torch.tensor([3.0, 9.0])}
    call["x"][1] = math.nan
    with wrap(Model(), sigma_range=(0.0, 4.0)) as ranged, wrap(Model()) as everywhere:
        result, expected = ranged(**call), everywhere(**call)
    assert torch.equal(result[0], expected[0]) and result[0].isfinite().all() and result[1].isnan().all()


class DivergesAboveFour(nn.Module):
    """A model whose second pass comes to nothing at a high sigma."""

    def __init__(self):
        super().__init__()
        self.inner_model, self.passes = Model(), 0

    def forward(self, x, sigma, text):
        self.passes += 1
        denoised = self.inner_model(x, sigma, text=text)
        diverges = (sigma > 4) & (self.passes % 2 == 0)
        return torch.where(diverges[:, None, None, None], math.nan, denoised)


def test_a_direction_that_is_not_wanted_is_left_out_whatever_it_is():
    call = {**good_call(), "sigma": torch.tensor([3.0, 9.0])}
    with wrap(DivergesAboveFour()) as everywhere, wrap(DivergesAboveFour(), sigma_range=(0.0, 4.0)) as ranged:
        guided, result = everywhere(**call), ranged(**call)
    with wrap(Model()) as other:
        plain = other(**call, sag_scale=0.0)
    assert guided[1].isnan().all()
    assert torch.equal(result[0], guided[0]) and torch.equal(result[1], plain[1])


# The parameters that can be assigned later


def test_the_repr_shows_them_in_the_order_of_the_signature(guided):
    assert tuple(ksag.SAG.keywords) == PER_CALL
    shown = repr(guided)
    for name in PARAMETERS:
        value = "plain" if name == "cfg_rule" else repr(getattr(guided, name))
        assert f"{name}={value}" in shown and f"<td>{name}</td>" in guided._repr_html_()
    assert [part.partition("=")[0] for part in shown.split("(", 1)[1].split(", ") if "=" in part] == ["attention", *PARAMETERS]


def test_the_defaults_are_kept_as_they_are_and_documented():
    documents = "".join(cls.__doc__ for cls in (ksag.SAGDenoiser, ksag.GuidedDenoiser, ksag.SAG, ksag.Direction))
    guided = ksag.SAGDenoiser(make_denoiser(), cond_key="mapping_cond")
    for name in PARAMETERS:
        default = inspect.signature(ksag.SAGDenoiser).parameters[name].default
        assert getattr(guided, name) == ("mapping_cond" if name == "cond_key" else default)
        assert re.search(rf"^ +(\w+, )*{name}(, \w+)*: ", documents, re.M), name


OF_A_DIRECTION = [
    *[("scale", value, "scale " + message) for value, message in NOT_NUMBERS if not isinstance(value, torch.Tensor)],
    ("scale", torch.ones(2, 1), r"scale must be a number, got a tensor of shape \(2, 1\)"),
    ("scale", nn.Parameter(torch.ones(2)), "got an nn.Parameter: give its .detach"),
    ("sigma_range", (5.0, 1.0), r"got \(5.0, 1.0\): give \(1.0, 5.0\)\?"),
    ("every", 0, "n = 1 or more, got the int 0"),
    ("blur_sigma", math.nan, "blur_sigma is a standard deviation in tokens, .* got nan"),
    ("blur_sigma", -1.0, "got -1.0"),
    ("blur_sigma", "wide", "must be a number, got the str 'wide'"),
]


@pytest.mark.parametrize(("name", "value", "message"), OF_A_DIRECTION)
@pytest.mark.parametrize("cls", [ksag.PAG, ksag.SEG])
def test_malformed_settings_of_a_direction(cls, name, value, message):
    direction = cls()
    if not hasattr(direction, name):
        return
    before = getattr(direction, name)
    with pytest.raises(ValueError, match=message):
        cls(**{name: value})
    with pytest.raises(ValueError, match=message):
        setattr(direction, name, value)
    assert getattr(direction, name) is before


def test_a_long_value_is_cut_in_its_error():
    with pytest.raises(ValueError, match=r"got the str 'x+\.\.\.\.$"):
        parameters.number("sag_scale", "x" * 1000)
    with pytest.raises(ValueError) as error:
        parameters.number("sag_scale", list(range(100_000)))
    assert len(str(error.value)) < 200
