import json

import k_diffusion as K
import pytest
import torch
from safetensors.torch import load_file, save_file

import ksag
from ksag import zoo
from ksag.samplers import sample


def test_the_bundled_model_is_small_and_carries_its_config():
    assert zoo.CIFAR10.stat().st_size <= 16 * 2**20
    assert all(t.dtype == torch.float16 for t in load_file(zoo.CIFAR10).values())
    config = json.loads(zoo.CIFAR10.with_suffix(".json").read_text())
    assert zoo.load_config() == K.config.load_config(config)
    assert K.config.load_config(zoo.CIFAR10) == zoo.load_config()  # k-diffusion itself can read the file


def test_load_returns_a_k_diffusion_denoiser(bundled):
    assert isinstance(bundled, K.layers.Denoiser) and bundled.sigma_data == 0.5
    assert isinstance(bundled.inner_model, K.models.ImageDenoiserModelV1)
    assert not bundled.training and not any(p.requires_grad for p in bundled.parameters())


def test_the_classes_are_those_of_the_config():
    assert list(zoo.CLASSES) == zoo.load_config()["dataset"]["classes"]


def test_conditioning_takes_names_and_numbers():
    cond, uncond = zoo.conditioning(["cat", 7, "airplane"])
    assert torch.equal(cond, zoo.one_hot([3, 7, 0])) and torch.equal(uncond, torch.zeros(3, 10))


@pytest.mark.parametrize(("classes", "wrong"), [(["cat", "lynx"], "'lynx'"), ([10], "10"), ([-1], "-1"), ("cat", "'c'")])
def test_conditioning_for_no_such_class(classes, wrong):
    with pytest.raises(ValueError, match=f"{wrong} is no class of the bundled model: give a list of 0 to 9, or of airplane, "):
        zoo.conditioning(classes)


def test_the_bundled_model_denoises_and_knows_its_classes(bundled):
    """On its own samples: noise that is added comes off again, and better so with the right class."""
    cond = zoo.one_hot([1, 7])
    sigmas = K.sampling.get_sigmas_karras(8, 0.01, 80.0)
    x = sample("euler", bundled, (3, 32, 32), sigmas, [0, 1], {"mapping_cond": cond})
    assert x.abs().max() < 1.6 and x.std() > 0.2
    torch.manual_seed(0)
    noise = torch.randn_like(x) * 0.3
    sigma = torch.full((2,), 0.3)

    def error(cond):
        return (bundled(x + noise, sigma, mapping_cond=cond) - x).square().mean()

    assert error(cond) < 0.1 * noise.square().mean()
    assert error(cond) < error(cond.flip(0))


def test_sag_acts_on_the_bundled_model_where_it_looks(bundled):
    cond = zoo.one_hot([1, 7])
    guided = ksag.SAGDenoiser(bundled, 1.0, cond_key="mapping_cond")
    x = torch.randn(2, 3, 32, 32) * 2
    args = {"cond": cond, "uncond": torch.zeros_like(cond)}
    with guided.trace() as steps:
        result = guided(x, torch.full((2,), 2.0), **args)
    plain = guided(x, torch.full((2,), 2.0), **args, sag_scale=0.0)
    assert steps[0].saliency.shape == (2, 8, 8) and 0.1 < steps[0].mask.mean() < 0.9
    assert (result - plain).abs().max() > 1e-3


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "weights.safetensors"


def test_truncated_weights(weights):
    weights.write_bytes(zoo.CIFAR10.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=r"weights.safetensors is cut off, or no safetensors file"):
        zoo.load(weights)


def test_foreign_file(weights):
    weights.write_bytes(b"PK\x03\x04 this is a zip, or a pickle, or a picture")
    with pytest.raises(ValueError, match="is cut off, or no safetensors file"):
        zoo.load(weights)


def test_safetensors_of_another_kind(weights):
    save_file({"a": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="has no k-diffusion config in its metadata"):
        zoo.load(weights)


def test_weights_that_do_not_fit_their_config(weights):
    save_file({"a": torch.zeros(1)}, weights, {"config": zoo.CIFAR10.with_suffix(".json").read_text()})
    with pytest.raises(
        ValueError, match=r"does not fit its own config: \d+ of its tensors .* a is \(1,\) in the file, and unknown to the model"
    ):
        zoo.load(weights)


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors"):
        zoo.load("nowhere.safetensors")
