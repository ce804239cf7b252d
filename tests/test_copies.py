"""Does a copied or unpickled SAGDenoiser guide as the original does, and does each remove its own hooks and nobody else's?"""

import copy
import gc
import io
import pickle

import pytest
import torch

import ksag
from ksag import cfg
from tests import forms
from tests.models import hooks

gc.freeze()  # so that gc.collect() looks at what a test made, and not at all of PyTorch


def through_file(guided):
    file = io.BytesIO()
    torch.save(guided, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DEEP = {"deepcopy": copy.deepcopy, "pickle": lambda guided: pickle.loads(pickle.dumps(guided)), "torch.save": through_file}
COPIES = {"copy": copy.copy, **DEEP}


def wrap(denoiser, **options):
    return ksag.SAGDenoiser(denoiser, 0.8, blur_kernel_size=5, **options)


def call(guided, **options):
    x, args = forms.latents()
    return guided(x, torch.full((2,), 3.0), **args, **options)


@pytest.fixture(params=COPIES)
def copied(request):
    return COPIES[request.param]


@pytest.fixture(params=DEEP)
def deeply_copied(request):
    return DEEP[request.param]


@pytest.mark.parametrize(
    ("copied", "form"),
    [
        *((pickled, form) for pickled in [COPIES["pickle"]] for form in forms.FORMS),
        *((copied, form) for copied in COPIES.values() for form in ("SAG and PAG", "a user's own")),
    ],
)
def test_a_copy_guides_as_the_original(copied, form):
    guided = forms.wrap(form)
    expected = forms.run(guided)
    twin = copied(guided)
    for one in twin, guided:
        one.reset()
        assert torch.equal(forms.run(one), expected)
    assert repr(twin) == repr(guided)


@pytest.mark.parametrize("rule", [cfg.rescale(), cfg.apg(momentum=-0.5)])
def test_a_copy_has_the_rule_of_the_original(copied, rule):
    guided = wrap(forms.tiny(), cfg_rule=rule)
    expected = forms.run(guided)
    twin = copied(guided)
    assert torch.equal(forms.run(twin), expected) and repr(twin.cfg_rule) == repr(rule)


@pytest.mark.parametrize("first", ["original", "copy"])
@pytest.mark.parametrize("end", ["close", "drop"])
def test_each_removes_its_own_hooks(copied, first, end):
    denoiser = forms.tiny()
    pair = {"original": wrap(denoiser)}
    one = hooks(denoiser)
    expected = call(pair["original"])
    pair["copy"] = copied(pair["original"])
    inner = {name: guided.inner_model for name, guided in pair.items()}
    shared = inner["copy"] is denoiser
    assert hooks(denoiser) == (2 * one if shared else one) and hooks(inner["copy"]) == hooks(denoiser)

    def finish(name):
        if end == "close":
            pair[name].close()
        del pair[name]
        gc.collect()

    other = "copy" if first == "original" else "original"
    finish(first)
    assert hooks(inner[first]) == (one if shared else 0) and hooks(inner[other]) == one
    assert torch.equal(call(pair[other]), expected)
    finish(other)
    assert hooks(inner[first]) == hooks(inner[other]) == 0


def test_a_copy_leaves_the_hooks_of_others(copied):
    denoiser = forms.tiny()
    called = []
    handle = denoiser.out.register_forward_hook(called_by(called))
    other = wrap(denoiser, attention=forms.LAYERS[1])
    expected = call(other)
    guided = wrap(denoiser)
    twin = copied(guided)
    twin.close()
    guided.close()
    called.clear()
    assert torch.equal(call(other), expected) and called
    if twin.inner_model is not denoiser:
        assert hooks(twin.inner_model) == 1  # the caller's own, whatever wrappers the original had
    other.close()
    assert hooks(denoiser) == 1
    handle.remove()


class called_by:
    """A hook of the caller's, which can be pickled."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, module, args, output):
        self.calls.append(module)


def test_two_wrappers_copied_together_still_share_their_model(deeply_copied):
    denoiser = forms.tiny()
    pair = torch.nn.ModuleList([wrap(denoiser), wrap(denoiser, attention=forms.LAYERS[1])])
    expected = [call(guided) for guided in pair]
    twins = deeply_copied(pair)
    assert twins[0].inner_model is twins[1].inner_model is not denoiser
    assert all(torch.equal(call(twin), e) for twin, e in zip(twins, expected, strict=True))
    twins[0].close()
    assert torch.equal(call(twins[1]), expected[1])
    twins[1].close()
    assert hooks(twins[0].inner_model) == 0 and hooks(denoiser) > 0


def test_a_copy_of_the_model_alone_is_not_watched(monkeypatch):
    denoiser = forms.tiny()
    guided = wrap(denoiser)
    expected = call(guided)
    alone = copy.deepcopy(denoiser)
    x, args = forms.latents()
    monkeypatch.setattr(ksag.attention.tap.AttentionTap, "_start", lambda *_: pytest.fail("it was seen"))
    with guided.tap.recording(rows=2):
        alone(x, torch.ones(2), args["cond"])
    monkeypatch.undo()
    with wrap(alone) as twin:
        assert torch.equal(call(twin), expected)
    assert hooks(alone) == 0 and hooks(denoiser) > 0


def test_a_copy_of_a_closed_wrapper_is_closed(copied):
    guided = wrap(forms.tiny())
    guided.close()
    twin = copied(guided)
    assert hooks(twin.inner_model) == 0
    assert torch.equal(call(twin, sag_scale=0.0), call(guided, sag_scale=0.0))
    with pytest.raises(RuntimeError, match=r"was closed"):
        call(twin)


def test_a_copy_has_directions_of_its_own(copied):
    guided = forms.wrap("SAG in one pass, PAG and SEG")
    expected = forms.run(guided)
    twin = copied(guided)
    for direction in twin.directions:
        direction.scale = 0.0
    assert torch.equal(forms.run(twin), forms.plain(twin))
    guided.reset()
    assert torch.equal(forms.run(guided), expected) and not torch.equal(forms.run(twin), expected)


def test_a_copy_has_settings_and_a_model_of_its_own(copied):
    guided = wrap(forms.tiny())
    expected = call(guided)
    twin = copied(guided)
    twin.sag_scale, twin.blur_sigma = 2.0, 1.0
    twin.inner_model = forms.tiny(seed=1)
    assert (guided.sag_scale, guided.blur_sigma) == (0.8, 2.0) and torch.equal(call(guided), expected)


@pytest.mark.parametrize("form", [{"one_pass": True}, {"every": 2}])
def test_a_copy_begins_a_run_of_its_own(copied, form):
    guided = wrap(forms.tiny(), **form)
    first, second = call(guided), call(guided)
    twin = copied(guided)
    assert torch.equal(call(twin), first) and torch.equal(call(twin), second)
    fresh = wrap(forms.tiny(), **form)
    expected = [call(fresh) for _ in range(4)]
    assert torch.equal(call(guided), expected[2])  # whose run the copy's calls did not disturb
    assert torch.equal(call(guided), expected[3])
