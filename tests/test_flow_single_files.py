"""Does `load` take a single file of Stable Diffusion 3 or Flux, and say what another one lacks?"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

import ksag.adapters.diffusers as adapter
from tests.commands import invoke, pixels
from tests.diffusers_pipelines import stable_diffusion_xl
from tests.flow_pipelines import flux, schnell, stable_diffusion_3
from tests.hostile_folders import edit
from tests.models import seeded
from tests.single_files import flow_file, made_once


def stable_diffusion_35(folder):
    """With the normalised queries and keys of 3.5, and the second attention of 3.5 medium."""
    pipe = stable_diffusion_3(folder)
    options = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
    pipe.transformer = seeded(lambda: SD3Transformer2DModel.from_config(pipe.transformer.config, **options))
    return pipe


@pytest.fixture(autouse=True)
def narrow_flux(monkeypatch):
    """diffusers splits the single blocks of Flux at its real width, 3072. These are 32 wide."""

    def split(tensor, sizes, dim):
        return torch.split(tensor, [size * len(tensor) // sum(sizes) for size in sizes], dim)

    scaled = SimpleNamespace(split=split, chunk=torch.chunk, cat=torch.cat)
    monkeypatch.setattr("diffusers.loaders.single_file_utils.torch", scaled)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The pipeline that a function makes, and its folder. Norms get random weights, because all are one at first."""

    def saved(pipe, folder):
        generator = torch.Generator().manual_seed(0)
        for parameter in pipe.transformer.requires_grad_(False).parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        pipe.save_pretrained(folder / "pipe")
        return pipe, folder / "pipe"

    return made_once(tmp_path_factory, saved)


def assert_same(actual, expected, without=()):
    assert type(actual) is type(expected)
    for name, part in expected.components.items():
        if name in without:
            assert getattr(actual, name) is None
        elif isinstance(part, torch.nn.Module):
            state = getattr(actual, name).state_dict()
            assert state.keys() == part.state_dict().keys()
            assert all(torch.equal(state[key], tensor) for key, tensor in part.state_dict().items()), name


NAMES = {"model.diffusion_model.": "first_stage_model.", "": "vae."}


@pytest.mark.parametrize("prefix", NAMES)
@pytest.mark.parametrize("make", [stable_diffusion_3, stable_diffusion_35, flux, schnell])
def test_a_file_gives_the_pipeline_of_its_folder(made, tmp_path, make, prefix):
    pipe, folder = made(make)
    file = flow_file(pipe, tmp_path / "m.safetensors", prefix=prefix, vae=NAMES[prefix])
    loaded = adapter.load(file, config=folder)
    assert_same(loaded, pipe)
    assert loaded.scheduler.config.shift == pipe.scheduler.config.shift and not loaded.transformer.training


@pytest.mark.parametrize("make", [stable_diffusion_3, flux])
def test_the_same_picture_from_the_shell(made, tmp_path, make):
    pipe, folder = made(make)
    file = flow_file(pipe, tmp_path / "m.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    args = ["--prompt", "a cat", "--size", "32x24", "--seed", 4, "--steps", 2, "--device", "cpu"]
    invoke("sample", "--pipeline", folder, *args, "--out", tmp_path / "folder.png")
    invoke("sample", "--pipeline", file, "--config", folder, *args, "--out", tmp_path / "file.png")
    picture = pixels(tmp_path / "file.png")
    difference = (picture - pixels(tmp_path / "folder.png")).abs()
    assert difference.max() <= 2 and difference.mean() < 0.05  # of 255: tensors at other addresses are multiplied in another order
    assert len(picture.unique()) > 10


def test_stable_diffusion_3_without_t5(made, tmp_path):
    """As sd3_medium_incl_clips.safetensors: the prompt goes to CLIP alone, like in diffusers with text_encoder_3=None."""
    pipe, folder = made(stable_diffusion_3)
    file = flow_file(pipe, tmp_path / "m.safetensors", leave_out=["text_encoders.t5xxl."])
    loaded = adapter.load(file, config=folder)
    assert_same(loaded, pipe, without=["text_encoder_3"])
    cond, _ = adapter.conditioning(loaded, "a cat")
    with_t5, _ = adapter.conditioning(pipe, "a cat")
    (text, zeros), (expected, _) = (side["encoder_hidden_states"].split([16, 256], dim=1) for side in (cond, with_t5))
    torch.testing.assert_close(text, expected)
    torch.testing.assert_close(cond["pooled_projections"], with_t5["pooled_projections"])
    assert not zeros.any()


def test_a_projection_that_the_file_leaves_out_is_the_identity(made, tmp_path):
    pipe, folder = made(stable_diffusion_3)
    file = flow_file(pipe, tmp_path / "m.safetensors", leave_out=["text_encoders.clip_l.transformer.text_projection."])
    assert torch.equal(adapter.load(file, config=folder).text_encoder.text_projection.weight, torch.eye(32))


def test_weights_in_eight_bits(made, tmp_path):
    """As in flux1-dev-fp8.safetensors."""
    pipe, folder = made(flux)
    tensors = load_file(flow_file(pipe, tmp_path / "m.safetensors"))
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
    loaded = adapter.load(flow_file(pipe, tmp_path / "m.safetensors", extra=eight), config=folder, dtype=torch.bfloat16)
    for part in "transformer", "text_encoder", "text_encoder_2":
        for name, tensor in getattr(pipe, part).state_dict().items():
            assert torch.equal(getattr(loaded, part).state_dict()[name], tensor.to(torch.float8_e4m3fn).to(torch.bfloat16)), name


# What a wrong file is

ENCODERS = {
    stable_diffusion_3: "no CLIP-L text encoder and no CLIP-G text encoder",
    flux: "no CLIP-L text encoder and no T5 text encoder",
}
LACKS = [(make, ["text_encoders."], lacks) for make, lacks in ENCODERS.items()]
LACKS += [(make, ["text_encoders.", "first_stage_model."], f"no VAE and {lacks}") for make, lacks in ENCODERS.items()]
LACKS += [(flux, ["text_encoders.t5xxl."], "no T5 text encoder"), (stable_diffusion_3, ["first_stage_model."], "no VAE")]


@pytest.mark.parametrize(("make", "leave_out", "lacks"), LACKS)
def test_a_file_that_lacks_parts(made, tmp_path, make, leave_out, lacks):
    pipe, folder = made(make)
    file = flow_file(pipe, tmp_path / "m.safetensors", leave_out=leave_out)
    kind = "Flux" if make is flux else "Stable Diffusion 3"
    with pytest.raises(ValueError, match=rf"is not a whole {kind} checkpoint: it has {lacks}, so give a folder or a hub id\."):
        adapter.load(file, config=folder)


TENSORS = {
    stable_diffusion_3: "joint_blocks.1.x_block.attn.proj.bias",
    flux: "double_blocks.1.txt_mlp.0.bias",
}


@pytest.mark.parametrize("make", TENSORS)
def test_tensors_that_are_missing_or_unexpected(made, tmp_path, make):
    pipe, folder = made(make)
    prefix, t5 = "model.diffusion_model.", "text_encoders.t5xxl.transformer."
    for options, message in [
        ({"leave_out": [prefix + TENSORS[make]]}, rf"\(There is no '{TENSORS[make]}'"),
        ({"extra": {prefix + "final_layer.scale_weight": torch.ones(1)}}, r"unexpected: final_layer\.scale_weight \(1 in all\)"),
        ({"leave_out": [t5 + "encoder.final"]}, r"missing: encoder\.final_layer_norm\.weight \(1 in all\)"),
        ({"extra": {t5 + "scaled_fp8": torch.ones(1)}}, r"unexpected: scaled_fp8 \(1 in all\)"),
    ]:
        file = flow_file(pipe, tmp_path / "m.safetensors", **options)
        with pytest.raises(ValueError, match=rf"^m.safetensors cannot be loaded with the configs of {folder}.*{message}"):
            adapter.load(file, config=folder)


def test_a_file_whose_download_broke_off(made, tmp_path):
    pipe, folder = made(flux)
    file = flow_file(pipe, tmp_path / "m.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"is damaged, or not a .safetensors file"):
        adapter.load(file, config=folder)


def test_configs_of_another_model(made, tmp_path):
    stable_diffusion_xl(tmp_path)
    files = {make: flow_file(made(make)[0], tmp_path / f"{make.__name__}.safetensors") for make in (stable_diffusion_3, flux)}
    for make, other in (stable_diffusion_3, made(flux)[1]), (flux, made(stable_diffusion_3)[1]), (flux, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=r"is for a \w+Pipeline, but config=.* is for a \w+Pipeline"):
            adapter.load(files[make], config=other)


def test_configs_without_the_t5_that_the_file_has(made, tmp_path):
    pipe, _ = made(stable_diffusion_3)
    pipe.save_pretrained(tmp_path / "pipe")
    edit(tmp_path / "pipe" / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    with pytest.raises(ValueError, match=r"m.safetensors has 3 text encoders, but config=.* has 2"):
        adapter.load(flow_file(pipe, tmp_path / "m.safetensors"), config=tmp_path / "pipe")
