"""How must the image change when the input does? Relations that hold for any model, in float64, without a reference."""

import k_diffusion as K
import pytest
import torch
from torch.nn import functional as F

import ksag
from ksag import cfg
from tests import campaign

MODELS = ["k-diffusion", "k-diffusion transformer v1", "diffusers", "lucidrains"]
BATCH = 3


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


def sag(**settings):
    return ksag.SAG(**{"blur_kernel_size": 5, **settings})


DIRECTIONS = {
    "SAG": lambda model: [sag()],
    "PAG": lambda model: [ksag.PAG(0.7)],
    "PAG on every layer": lambda model: [ksag.PAG(0.7, campaign.layers(model))],
    "SEG": lambda model: [ksag.SEG(2.0, attention=campaign.layers(model)[-1])],
    "SEG, blurred": lambda model: [ksag.SEG(2.0, 1.0)],
}


def together(model):
    """All of them in one wrapper."""
    return [direction for make in DIRECTIONS.values() for direction in make(model)]


def guide(model, directions, **settings):
    return ksag.GuidedDenoiser(campaign.denoisers(model, torch.float64)[0], directions, **settings)


def wrapped(model, **settings):
    denoiser, _ = campaign.denoisers(model, torch.float64)
    return ksag.SAGDenoiser(denoiser, **{"blur_kernel_size": 5, **settings})


def inputs(model):
    """x, sigma, and the conditionings, of a batch whose samples differ in everything."""
    kind = campaign.MODELS[model]
    generator = torch.Generator().manual_seed(5)
    sigma = torch.tensor([0.5, 4.0, 1.0], dtype=torch.float64)
    x, cond, uncond = (
        torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)
        for shape in ((kind.channels, 8, 12), *[kind.cond or (kind.channels,)] * 2)
    )
    return x * (sigma.square() + 1).sqrt()[:, None, None, None], sigma, cond, uncond


def image(guided, x, sigma, cond, uncond, **options):
    return guided(x, sigma, **{"cond": cond, "uncond": uncond, "cond_scale": 3.0, "nesting": "tensor", **options})


def close(actual, expected):
    """Float64, where the order of the sums may change."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def differ(a, b):
    return (a - b).norm() > 1e-3 * b.norm()


def test_a_permuted_batch_is_the_permuted_image(model):
    with guide(model, together(model)) as guided:
        result = image(guided, *inputs(model))
        order = [2, 0, 1]
        close(image(guided, *(t[order] for t in inputs(model))), result[order])
    assert all(differ(result[i], result[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


def test_one_by_one_is_the_batch(model):
    with guide(model, together(model)) as guided:
        result = image(guided, *inputs(model))
        for i in range(BATCH):
            close(image(guided, *(t[i : i + 1] for t in inputs(model))), result[i : i + 1])


def test_a_sample_does_not_see_the_others(model):
    x, sigma, cond, uncond = inputs(model)
    others = x.clone()
    others[1:] = others[1:].flip(-1) * 2
    with guide(model, together(model)) as guided:
        result, changed = (image(guided, latent, sigma, cond, uncond) for latent in (x, others))
    close(changed[0], result[0])
    assert differ(changed[1:], result[1:])


def test_batch_cond_either_way(model):
    with guide(model, together(model)) as at_once, guide(model, together(model), batch_cond=False) as apart:
        close(image(apart, *inputs(model)), image(at_once, *inputs(model)))


# Several directions


def test_together_they_add_what_each_adds_alone(model):
    with guide(model, []) as without:
        plain = image(without, *inputs(model))
    added = torch.zeros_like(plain)
    for make in DIRECTIONS.values():
        with guide(model, make(model)) as guided:
            alone = image(guided, *inputs(model)) - plain
        assert differ(plain + alone, plain)
        added = added + alone
    with guide(model, together(model)) as guided:
        result = image(guided, *inputs(model))
        close(result, plain + added)
    with guide(model, together(model)[::-1]) as reversed_order:
        close(image(reversed_order, *inputs(model)), result)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_scale_is_linear_and_zero_is_nothing_bit_for_bit(name):
    model = "k-diffusion"
    with guide(model, []) as without, guide(model, DIRECTIONS[name](model)) as guided:
        plain = image(without, *inputs(model))
        [direction] = guided.directions
        images = {}
        for scale in 0.0, 0.75, 1.5, -0.75:
            direction.scale = scale
            images[scale] = image(guided, *inputs(model))
    assert torch.equal(images[0.0], plain) and differ(images[0.75], plain)
    close(images[1.5] - plain, 2 * (images[0.75] - plain))
    close(images[-0.75] - plain, plain - images[0.75])


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_of_scale_zero_changes_no_bit_of_the_others(name):
    model = "k-diffusion"
    others = [ksag.PAG(0.3, campaign.layers(model)[-1]), sag(blur_sigma=1.0)]
    with guide(model, others) as guided:
        expected = image(guided, *inputs(model))
    [silent] = DIRECTIONS[name](model)
    silent.scale = 0.0
    with guide(model, [others[0], silent, others[1]]) as guided:
        assert torch.equal(image(guided, *inputs(model)), expected)


def test_what_pag_and_seg_add_depends_on_cond_alone(model):
    x, sigma, cond, uncond = inputs(model)
    directions = [ksag.PAG(0.7), ksag.SEG(2.0, 1.0)]
    with guide(model, directions) as guided, guide(model, []) as without:
        once, other = (image(guided, x, sigma, cond, u) - image(without, x, sigma, cond, u) for u in (uncond, 0.5 * uncond))
        close(other, once)
        assert differ(image(guided, x, sigma, uncond, cond) - image(without, x, sigma, uncond, cond), once)


def test_the_order_and_the_repetition_of_layers_are_nothing(model):
    paths = campaign.layers(model)
    images = []
    for layers in paths, paths[::-1], [*paths, paths[0]]:
        with guide(model, [ksag.PAG(0.7, layers), ksag.SEG(2.0, 1.0, layers)]) as guided:
            images.append(image(guided, *inputs(model)))
    assert torch.equal(images[1], images[0]) and torch.equal(images[2], images[0])


@pytest.mark.parametrize("blur_sigma", [0.0, 1e-20])
def test_queries_blurred_by_nothing_are_plain_guidance(model, blur_sigma):
    with guide(model, ksag.SEG(5.0, blur_sigma)) as guided, guide(model, []) as without:
        close(image(guided, *inputs(model)), image(without, *inputs(model)))


# SAG


def test_sag_scale_doubled_doubles_what_is_added(model):
    with wrapped(model, blur_sigma=1.5) as guided:
        plain, once, twice, back = (image(guided, *inputs(model), sag_scale=scale) for scale in (0.0, 0.75, 1.5, -0.75))
    close(twice - plain, 2 * (once - plain))
    close(back - plain, plain - once)
    assert differ(once, plain)


def test_the_image_is_linear_in_cond_scale(model):
    with wrapped(model) as guided:
        at_1, at_3, at_7 = (image(guided, *inputs(model), cond_scale=scale) for scale in (1.0, 3.0, 7.0))
    close(at_7 - at_1, 3 * (at_3 - at_1))
    assert differ(at_3, at_1)


def test_what_is_added_does_not_depend_on_cond_nor_on_the_rule(model):
    x, sigma, cond, uncond = inputs(model)
    added = []
    for rule, other in (cfg.plain, cond), (cfg.plain, 0.5 * cond), (cfg.rescale(0.7), cond), (cfg.apg(momentum=0.0), cond):
        with wrapped(model, cfg_rule=rule) as guided:
            plain, with_sag = (image(guided, x, sigma, other, uncond, sag_scale=scale) for scale in (0.0, 2.0))
        added.append(with_sag - plain)
    assert differ(plain + added[0], plain)
    for other in added[1:]:
        close(other, added[0])


@pytest.mark.filterwarnings("ignore:blur_sigma=0 blurs nothing")
@pytest.mark.parametrize("options", [{"mask_threshold": 1e6}, {"blur_sigma": 0.0}, {"blur_sigma": 1e-160}])
def test_nothing_taken_away_is_plain_guidance(model, options):
    with wrapped(model) as guided:
        plain, without = image(guided, *inputs(model), sag_scale=0.0), image(guided, *inputs(model), **options)
    close(without, plain)


def test_where_all_is_masked_every_layer_gives_the_same_image(model):
    paths = campaign.layers(model)
    assert len(paths) > 1
    images = []
    for path in paths:
        with wrapped(model, attention=path, mask_threshold=-1.0) as guided:
            images.append(image(guided, *inputs(model)))
    for other in images[1:]:
        close(other, images[0])


def test_layers_see_different_things(model):
    images = []
    for path in campaign.layers(model):
        with wrapped(model, attention=path) as guided:
            images.append(image(guided, *inputs(model)))
    assert differ(images[0], images[-1])


def test_a_bias_that_all_predictions_share_is_added_to_the_image(model):
    x, sigma, cond, uncond = inputs(model)
    with wrapped(model, mask_threshold=-1.0) as guided:
        result, shifted = (
            image(guided, x, sigma, cond, uncond, shift=torch.full((BATCH, 1, 1, 1), shift)) for shift in (0.0, 0.25)
        )
    # u, g and r rise by the same, and so does d, because the blur's weights sum to 1
    c_out = (0.5 * sigma / (sigma.square() + 0.25).sqrt())[:, None, None, None]
    close(shifted, result + 0.25 * c_out)


def test_the_same_call_twice_is_the_same_image_bit_for_bit(model):
    with wrapped(model) as guided:
        once, twice = (image(guided, *inputs(model)) for _ in range(2))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("rule", [cfg.plain, cfg.apg(momentum=-0.5)], ids=cfg.shown)
@pytest.mark.parametrize("sampler", ["sample_euler", "sample_heun", "sample_dpmpp_2m"])
def test_the_same_run_twice_is_the_same_image_bit_for_bit(sampler, rule):
    x, _, cond, uncond = inputs("k-diffusion")
    sigmas = F.pad(torch.tensor([4.0, 2.5, 1.0, 0.5], dtype=torch.float64), (0, 1))
    args = {"cond": cond, "uncond": uncond, "cond_scale": 3.0, "nesting": "tensor"}
    with wrapped("k-diffusion", cfg_rule=rule) as guided:
        once, twice, unguided = (
            getattr(K.sampling, sampler)(guided, x, sigmas, extra_args={**args, "sag_scale": scale}, disable=True)
            for scale in (0.5, 0.5, 0.0)
        )
    assert torch.equal(once, twice)
    assert differ(once, unguided)
