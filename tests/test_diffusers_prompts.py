"""Are prompts encoded as the pipeline does it, and long ones as ComfyUI and A1111 do: in chunks of 75 tokens?"""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModelWithProjection

import ksag
import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import (
    open_clip,
    stable_diffusion,
    stable_diffusion_with_controlnet,
    stable_diffusion_xl,
    text_encoder,
)

ROOM = 14  # of the tests' text encoders: 16 tokens, less the begin and the end
BEGIN, END = 0, 1
LONG = "the quick brown fox jumps over a lazy dog"  # a token for each letter, so that two words are cut


def ids(*chunks):
    """The token ids of chunks, one row each: letters inside a word are 2 to 27, at its end 28 to 53. A "-" is where one is cut."""
    rows = []
    for chunk in chunks:
        row = [BEGIN]
        for word in chunk.split():
            row += [ord(letter) - ord("a") + 2 for letter in word[:-1]] + [ord(word[-1]) - ord("a") + 28] * (word[-1] != "-")
        row += [END] * (ROOM + 2 - len(row))
        rows.append(row)
    return torch.tensor(rows)


CHUNKS = ["the quick brown f-", "ox jumps over a la-", "zy dog"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return stable_diffusion_xl(tmp_path_factory.mktemp("xl"))


# As the pipeline does it


@pytest.mark.parametrize("negative", [None, "bad", ""])
@pytest.mark.parametrize("n", [1, 2])
def test_short_prompts_are_the_pipelines_own(sd, negative, n):
    cond, uncond = adapter.conditioning(sd, ["a cat", "a dog"], negative, n=n)
    negatives = None if negative is None else [negative] * 2
    expected, negative_expected = sd.encode_prompt(["a cat", "a dog"], "cpu", n, True, negatives)
    assert cond["encoder_hidden_states"].shape == (2 * n, 16, 32)
    assert torch.equal(cond["encoder_hidden_states"], expected)
    assert torch.equal(uncond["encoder_hidden_states"], negative_expected)


@pytest.mark.parametrize("texts", [
    {}, {"negative_prompt": "bad"}, {"prompt_2": "oil"}, {"negative_prompt": "bad", "negative_prompt_2": "ugly", "prompt_2": "oil"},
])  # fmt: skip
@pytest.mark.parametrize("zeros", [True, False])
def test_short_prompts_are_the_pipelines_own_in_sdxl(request, xl, texts, zeros):
    request.addfinalizer(lambda: xl.register_to_config(force_zeros_for_empty_prompt=True))
    xl.register_to_config(force_zeros_for_empty_prompt=zeros)
    cond, uncond = adapter.conditioning(xl, "a cat", **texts, n=2, size=(16, 24))
    expected = xl.encode_prompt("a cat", **texts, device="cpu", num_images_per_prompt=2, do_classifier_free_guidance=True)
    sides = (cond, expected[0], expected[2]), (uncond, expected[1], expected[3])
    for side, text, pooled in sides:
        assert torch.equal(side["encoder_hidden_states"], text)
        assert torch.equal(side["added_cond_kwargs"]["text_embeds"], pooled)
        assert side["added_cond_kwargs"]["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2


def test_clip_skip_is_the_pipelines_own_in_sdxl(xl):
    """Of the prompt; it leaves the negative prompt as it is, which ComfyUI, A1111 and ksag do not."""
    cond, uncond = adapter.conditioning(xl, "a cat", "bad", clip_skip=1)
    expected, bad = (
        xl.encode_prompt(text, device="cpu", do_classifier_free_guidance=False, clip_skip=1)[0] for text in ("a cat", "bad")
    )
    assert torch.equal(cond["encoder_hidden_states"], expected) and torch.equal(uncond["encoder_hidden_states"], bad)


def test_clip_skip_leaves_out_the_last_layers(sd):
    """The same encoder with a layer less, then its last norm, as A1111's Clip skip 2."""
    cond, uncond = adapter.conditioning(sd, "a cat", "bad", clip_skip=1)
    shorter = text_encoder()
    layers = shorter.encoder if hasattr(shorter, "encoder") else shorter.text_model.encoder
    layers.layers = nn.ModuleList(list(layers.layers)[:-1])
    for side, text in (cond, "a cat"), (uncond, "bad"):
        torch.testing.assert_close(side["encoder_hidden_states"], shorter(ids(text))[0])
    assert not torch.allclose(cond["encoder_hidden_states"], adapter.conditioning(sd, "a cat")[0]["encoder_hidden_states"])


@pytest.mark.parametrize("skip", [-1, 4, 99])
def test_a_clip_skip_beyond_the_text_encoder(sd, skip):
    with pytest.raises(ValueError, match=rf"clip_skip={skip}, but this text encoder has 4 layers"):
        adapter.conditioning(sd, "a cat", clip_skip=skip)


# Long ones


def encoded(encoder, *chunks):
    """(1, tokens, channels): the chunks encoded each for itself, one after the other."""
    return encoder(ids(*chunks))[0].flatten(0, 1)[None]


def test_a_long_prompt_is_its_chunks_one_after_the_other(sd):
    cond, uncond = adapter.conditioning(sd, LONG, "bad")
    assert cond["encoder_hidden_states"].shape == uncond["encoder_hidden_states"].shape == (1, 48, 32)
    torch.testing.assert_close(cond["encoder_hidden_states"], encoded(text_encoder(), *CHUNKS))
    torch.testing.assert_close(uncond["encoder_hidden_states"], encoded(text_encoder(), *["bad"] * 3))


def test_a_long_prompt_in_sdxl(xl):
    """The pooled embedding is the first chunk's; the shorter text of the two encoders is filled up with empty chunks."""
    cond, _ = adapter.conditioning(xl, LONG, "bad", prompt_2="short")
    second = open_clip(CLIPTextModelWithProjection)
    one, two = text_encoder()(ids(*CHUNKS), output_hidden_states=True), second(ids("short", "", ""), output_hidden_states=True)
    expected = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1).flatten(0, 1)[None]
    torch.testing.assert_close(cond["encoder_hidden_states"], expected)
    torch.testing.assert_close(cond["added_cond_kwargs"]["text_embeds"], two.text_embeds[:1])
    without = adapter.conditioning(xl, LONG)[1]
    assert without["encoder_hidden_states"].shape == (1, 48, 80) and not without["encoder_hidden_states"].any()


def test_a_shorter_prompt_in_a_list_is_filled_up(sd):
    cond, _ = adapter.conditioning(sd, [LONG, "a cat"], n=2)
    long, short = encoded(text_encoder(), *CHUNKS), encoded(text_encoder(), "a cat", "", "")
    torch.testing.assert_close(cond["encoder_hidden_states"], torch.cat([long, long, short, short]))


def test_repeated_tokens_change_nothing(sd):
    """Attention over the same keys several times is attention over them once, so cond and uncond go in one batch."""
    model: UNet2DConditionModel = sd.unet
    _, uncond = adapter.conditioning(sd, LONG, "bad")
    once = sd.encode_prompt("bad", "cpu", 1, False)[0]
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    repeated = model(x, t, **uncond).sample
    torch.testing.assert_close(repeated, model(x, t, once).sample)
    assert not torch.allclose(repeated, model(x, t, torch.zeros_like(once)).sample, atol=1e-3)


def test_lengths_of_which_none_divides_the_other(sd):
    cond, uncond = adapter.conditioning(sd, LONG, "ox jumps over a lazy dog")
    assert cond["encoder_hidden_states"].shape == uncond["encoder_hidden_states"].shape == (1, 6 * 16, 32)
    torch.testing.assert_close(uncond["encoder_hidden_states"], encoded(text_encoder(), *CHUNKS[1:]).repeat(1, 3, 1))


def test_a_long_prompt_is_guided(sd, caplog):
    cond, uncond = adapter.conditioning(sd, LONG, "bad")
    assert not caplog.records  # no talk of tokens that were cut off
    x, sigma = torch.randn(1, 4, 8, 8) * 4, torch.full((1,), 4.0)
    with ksag.SAGDenoiser(adapter.denoiser(sd), cond_key=None) as guided:
        one = guided(x, sigma, cond=cond, uncond=uncond, cond_scale=5.0)
        guided.batch_cond = False
        torch.testing.assert_close(guided(x, sigma, cond=cond, uncond=uncond, cond_scale=5.0), one, rtol=1e-4, atol=1e-4)


def test_a_textual_inversion_of_several_vectors(tmp_path):
    """Its name in the prompt becomes all of its tokens."""
    pipe = stable_diffusion(tmp_path)
    pipe.load_textual_inversion(torch.randn(3, 32), token="<thing>")
    cond, _ = adapter.conditioning(pipe, "abcdefghij klm <thing>")
    first = pipe.tokenizer.convert_tokens_to_ids("<thing>")
    chunks = ids("abcdefghij klm", "")
    chunks[0, 14], chunks[1, 1:3] = first, torch.arange(first + 1, first + 3)
    torch.testing.assert_close(cond["encoder_hidden_states"], pipe.text_encoder(chunks)[0].flatten(0, 1)[None])
    short, _ = adapter.conditioning(pipe, "a <thing>")
    assert torch.equal(short["encoder_hidden_states"], pipe.encode_prompt("a <thing>", "cpu", 1, False)[0])


# What does not fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negative_prompt": ["one", "two", "three"]}, r"2 prompts, but 3 texts beside them"),
        ({"prompt_2": "oil"}, r"has one text encoder, so it takes no prompt_2"),
        ({"control": torch.zeros(1, 3, 16, 16)}, r"A StableDiffusionPipeline has no ControlNet"),
    ],
)
def test_arguments_that_do_not_fit(sd, arguments, message):
    with pytest.raises(ValueError, match=message):
        adapter.conditioning(sd, ["a cat", "a dog"], **arguments)


def test_a_pipeline_with_other_text_encoders(sd):
    class Other:
        tokenizer, text_encoder = object(), nn.Linear(1, 1)

    with pytest.raises(TypeError, match=r"with CLIP text encoders; got a Other. Make cond and uncond of what its encode_prompt"):
        adapter.conditioning(Other(), "a cat")


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 3, 16, 16), r"3 control pictures for 2 prompts"), ((3, 16, 16), r"is a tensor \(b, 3")]
)
def test_control_pictures_that_do_not_fit(tmp_path, shape, message):
    pipe = stable_diffusion_with_controlnet(tmp_path)
    with pytest.raises(ValueError, match=message):
        adapter.conditioning(pipe, ["a cat", "a dog"], control=torch.rand(shape))
