"""Does `load` run nothing in a folder, unpickle nothing, take weights only whole, and say in one line what is damaged?"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import stable_diffusion, stable_diffusion_with_t2i_adapter, stable_diffusion_xl, text_encoder
from tests.flow_pipelines import flux, stable_diffusion_3
from tests.hostile_folders import DAMAGED, IGNORED, PICKLED, REFUSED, edit, plant, weights
from tests.single_files import single_file


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder of a good pipeline, and the same as a single file."""
    path = tmp_path_factory.mktemp("good")
    single_file(stable_diffusion(path), path / "model.safetensors")
    return path


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good / "pipe", tmp_path / "pipe")


@pytest.fixture
def ran(folder, tmp_path, monkeypatch):
    """The file that code or a pickle makes. The working directory, with code, is where Python imports from."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.syspath_prepend(str(tmp_path / "cwd"))
    plant(folder, tmp_path / "cwd", tmp_path / "ran")
    yield tmp_path / "ran"
    sys.modules.pop("evil", None)


@pytest.fixture(autouse=True)
def no_pickles(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr("torch.load", load)


def assert_same(actual, expected):
    for name, part in expected.components.items():
        if isinstance(part, torch.nn.Module):
            state = getattr(actual, name).state_dict()
            assert state.keys() == part.state_dict().keys()
            assert all(torch.equal(state[key], tensor) for key, tensor in part.state_dict().items()), name


def refusal(*args, **kwargs):
    """The one line of the error."""
    with pytest.raises(ValueError) as error:
        adapter.load(*args, **kwargs)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1200
    return str(error.value)


def test_code_is_refused_before_anything_is_loaded(folder, good, ran):
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    for kind, change in REFUSED.items():
        shutil.copy(good / "pipe" / "model_index.json", folder)
        change(folder)
        for given in {"path_or_id": folder}, {"path_or_id": good / "model.safetensors", "config": folder}:
            assert "runs no code from a model folder" in refusal(**given), kind
            assert not ran.exists() and "evil" not in sys.modules, kind


def test_other_names_of_code_are_ignored(folder, good, ran):
    """All at once, because a good folder takes long to load."""
    for change in IGNORED.values():
        change(folder)
    expected = DiffusionPipeline.from_pretrained(good / "pipe", local_files_only=True)
    assert_same(adapter.load(folder), expected)
    assert_same(adapter.load(good / "model.safetensors", config=folder), expected)
    assert not ran.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("kind", PICKLED)
def test_nothing_is_unpickled_or_read_from_elsewhere(folder, ran, kind):
    change, message = PICKLED[kind]
    change(folder)
    assert re.search(message, refusal(folder))
    assert not ran.exists()


def test_a_single_file_without_a_text_encoder_does_not_get_one_from_the_configs(folder, good, ran, tmp_path):
    """diffusers would unpickle that of the configs."""
    tensors = load_file(good / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("cond_stage_model.")}
    save_file(kept | {"cond_stage_model.other": torch.zeros(1)}, tmp_path / "m.safetensors")
    assert "m.safetensors cannot be loaded" in refusal(tmp_path / "m.safetensors", config=folder)
    assert not ran.exists()


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_folder_is_said_in_one_line(folder, kind):
    change, message = DAMAGED[kind]
    change(folder)
    error = refusal(folder)
    assert re.search(message, error)
    assert error.startswith(str(folder)) and "pickle" not in error


@pytest.mark.slow
def test_python_m_ksag_imports_nothing_from_the_working_directory(folder, ran):
    REFUSED["scheduler of its own"](folder)
    command = [sys.executable, "-m", "ksag", "sample", "--pipeline", str(folder), "--prompt", "a", "--out", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"Error: {folder}")
    assert not ran.exists()


# What must still work


@pytest.mark.parametrize("make", [stable_diffusion_3, flux])
def test_transformers(tmp_path, make):
    pipe = make(tmp_path)
    loaded = adapter.load(tmp_path / "pipe", dtype=torch.bfloat16)
    assert type(loaded) is type(pipe) and loaded.transformer.dtype == loaded.vae.dtype == torch.bfloat16
    assert_same(adapter.load(tmp_path / "pipe"), pipe)
    assert type(loaded.scheduler) is type(pipe.scheduler) and loaded.scheduler.config.shift == pipe.scheduler.config.shift


def test_stable_diffusion_3_without_its_largest_text_encoder(tmp_path):
    pipe = stable_diffusion_3(tmp_path)
    edit(tmp_path / "pipe" / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    loaded = adapter.load(tmp_path / "pipe")
    assert loaded.text_encoder_3 is None and loaded.tokenizer_3 is None
    assert torch.equal(loaded.text_encoder_2.state_dict().popitem()[1], pipe.text_encoder_2.state_dict().popitem()[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_in_several_files(tmp_path, good, dtype):
    pipe = DiffusionPipeline.from_pretrained(good / "pipe", local_files_only=True, torch_dtype=dtype)
    pipe.save_pretrained(tmp_path / "pipe", max_shard_size="100KB", variant="fp16" if dtype == torch.float16 else None)
    assert len(list((tmp_path / "pipe").glob("*/*.index*.json"))) >= 2
    assert_same(adapter.load(tmp_path / "pipe", dtype=dtype), pipe)


def test_the_variant_that_is_asked_for_and_the_full_weights_of_the_others(tmp_path, good, folder):
    half = DiffusionPipeline.from_pretrained(good / "pipe", local_files_only=True)
    torch.nn.init.zeros_(half.unet.conv_in.weight)
    half.unet.save_pretrained(folder / "unet", variant="fp16")
    assert adapter.load(folder, variant="fp16").unet.conv_in.weight.abs().max() == 0
    assert adapter.load(folder).unet.conv_in.weight.abs().max() > 0
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert adapter.load(folder).unet.conv_in.weight.abs().max() == 0
    half.unet.save_pretrained(folder / "unet", variant="ema")
    assert "unet has no weights that ksag loads, only" in refusal(folder)
    assert "has no files of the variant 'bf16'" in refusal(folder, variant="bf16")


def test_a_folder_of_links_as_in_the_hubs_cache(tmp_path, folder, good):
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.move(file, tmp_path / "blobs" / str(i))
        file.symlink_to(os.path.relpath(tmp_path / "blobs" / str(i), file.parent))
    assert_same(adapter.load(folder), DiffusionPipeline.from_pretrained(good / "pipe", local_files_only=True))


def old_names(tensors):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [name for name in tensors if any(f".{part}." in name for part in new)]:
        part = next(part for part in new if f".{part}." in name)
        tensors[name.replace(part, new[part])] = tensors.pop(name)


def test_a_vae_with_the_names_of_old_files(folder, good):
    weights("vae", old_names)(folder)
    assert any(".query." in name for name in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    assert_same(adapter.load(folder), DiffusionPipeline.from_pretrained(good / "pipe", local_files_only=True))


def test_the_position_ids_of_old_text_encoders_are_not_missed(folder, good):
    weights("text_encoder", lambda given: given | {"text_model.embeddings.position_ids": torch.arange(16)[None]})(folder)
    assert_same(adapter.load(folder), DiffusionPipeline.from_pretrained(good / "pipe", local_files_only=True))


def test_a_folder_with_an_adapter(tmp_path):
    pipe = stable_diffusion_with_t2i_adapter(tmp_path)
    assert_same(adapter.load(tmp_path / "pipe"), pipe)


def test_a_tokenizer_that_does_not_say_how_many_tokens_fit(folder):
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    cond, _ = adapter.conditioning(adapter.load(folder), "a" * 100)
    assert cond["encoder_hidden_states"].shape[1] % 16 == 0


def test_parts_for_pictures(folder):
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, projection_dim=8
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    CLIPImageProcessor(crop_size={"height": 32, "width": 32}).save_pretrained(folder / "feature_extractor")
    edit(
        folder / "model_index.json",
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        requires_safety_checker=True,
    )
    pipe = adapter.load(folder)
    assert pipe.image_encoder.config.hidden_size == 16 and pipe.feature_extractor.crop_size["height"] == 32
    assert pipe.safety_checker is None and pipe.config["requires_safety_checker"] is False


def test_an_xl_pipeline_without_one_of_its_text_encoders(tmp_path):
    stable_diffusion_xl(tmp_path)
    edit(tmp_path / "pipe" / "model_index.json", text_encoder=[None, None], tokenizer=None, force_zeros_for_empty_prompt=False)
    pipe = adapter.load(tmp_path / "pipe")
    assert pipe.text_encoder is None and pipe.text_encoder_2 is not None and pipe.config["force_zeros_for_empty_prompt"] is False


def test_text_encoders_of_another_model_are_refused(folder):
    other = text_encoder(hidden_size=16)
    shutil.rmtree(folder / "text_encoder")
    other.save_pretrained(folder / "text_encoder")
    assert "has text encoders of another model: they give 16 channels, but 32 are needed" in refusal(folder)


def test_the_index_on_the_hub_is_checked_before_the_rest_is_downloaded(folder, monkeypatch):
    REFUSED["scheduler of its own"](folder)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: str(folder / name))
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *args, **kwargs: pytest.fail("something was downloaded"))
    assert "runs no code from a model folder" in refusal("owner/name")


def test_the_folder_from_the_hub_is_checked_again(folder, good, monkeypatch):
    """It may have changed in between."""
    REFUSED["scheduler of its own"](folder)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: str(good / "pipe" / name))
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *args, **kwargs: str(folder))
    assert "runs no code from a model folder" in refusal("owner/name")


def test_the_configs_of_a_hub_id_are_checked_too(folder, good, monkeypatch):
    REFUSED["scheduler of its own"](folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **kwargs: str(folder))
    for config in "owner/name", None:
        assert "runs no code from a model folder" in refusal(good / "model.safetensors", config=config)


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_a_single_file_with_weights_missing_too_many_or_of_another_shape(tmp_path, make):
    file = single_file(make(tmp_path), tmp_path / "m.safetensors")
    tensors = load_file(file)
    block = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
    text = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.bias"))
    changes = {
        "missing: ": {name: tensor for name, tensor in tensors.items() if name != block},
        "missing:": {name: tensor for name, tensor in tensors.items() if name != text},
        "unexpected": tensors | {text.replace("layers.1.", "layers.9."): tensors[text]},
        "of another shape": tensors | {block: tensors[block][:-1].contiguous()},
    }
    for message, changed in changes.items():
        save_file({name: tensor.clone() for name, tensor in changed.items()}, file)
        error = refusal(file, config=tmp_path / "pipe")
        assert message in error and "m.safetensors cannot be loaded with the configs of" in error


def test_the_generator_changes_what_it_says(good, tmp_path):
    def files(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    light = {"ignore": shutil.ignore_patterns("*.safetensors")}
    before = files(shutil.copytree(good / "pipe", tmp_path / "before", **light))
    for kind, change in (REFUSED | IGNORED).items():
        folder = shutil.copytree(good / "pipe", tmp_path / kind, **light)
        change(folder)
        assert files(folder) != before, kind
