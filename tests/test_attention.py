"""Finding a layer, and the life of the hooks on it. tests/test_families.py has how each family is read."""

import copy
import gc
import threading

import pytest
import torch

import ksag
from ksag.attention.find import find_attention
from ksag.attention.tap import AttentionTap
from tests.models import compvis_unet, conditional, hooks, inputs, make_denoiser, seeded

gc.freeze()  # so that gc.collect() looks at what a test made, and not at all of PyTorch


def test_list_attention_leaves_out_cross_attention():
    # The text's width is the middle's own, so that nothing but its name or flag tells the one from the other
    for model in seeded(compvis_unet), seeded(conditional):
        paths = [layer.path for layer in ksag.list_attention(model)]
        assert len(paths) >= 3 and all(path.endswith("attn1") for path in paths)
    assert ksag.list_attention(make_denoiser())[0] == (
        "inner_model.u_net.d_blocks.1.2",
        "k-diffusion SelfAttention2d",
        2,
        None,
        False,
    )


def test_attention_is_named_by_path_from_anywhere_or_by_module(denoiser):
    layer = denoiser.inner_model.u_net.u_blocks[0][1]
    for attention in "inner_model.u_net.u_blocks.0.1", "u_net.u_blocks.0.1", layer:
        assert find_attention(denoiser, attention)[:2] == ("inner_model.u_net.u_blocks.0.1", layer)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("u_net.d_blocks.9", r"does not exist in Denoiser. Name one of its 2 self-attention layers .*d_blocks\.1\.2"),
        ("u_net.d_blocks.1", r"\(DBlock\) is no self-attention layer.*d_blocks\.1\.2"),
        ("out_proj", r"could be any of .*d_blocks\.1\.2\.out_proj"),
        (torch.nn.Linear(2, 2), "attention= is a Linear, and not part of inner_model"),
    ],
)
def test_a_wrong_name_gets_the_nearest_candidates(denoiser, attention, message):
    with pytest.raises(ValueError, match=message):
        AttentionTap(denoiser, attention)
    assert hooks(denoiser) == 0


def test_no_self_attention_lists_what_looks_like_it():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match=r"No self-attention.*'1' \(unknown MultiheadAttention: not supported: .*\).*attention="):
        ksag.SAGDenoiser(model)


def test_no_middle_lists_what_there_is():
    with pytest.raises(ValueError, match=r"No self-attention found in the middle.*'attentions.0.transformer_blocks.0.attn1'"):
        ksag.SAGDenoiser(seeded(conditional).down_blocks[0])


def test_cross_attention_is_refused():
    with pytest.raises(ValueError, match=r"\(CrossAttention\) is refused: it attends to the text"):
        ksag.SAGDenoiser(seeded(compvis_unet), attention="middle_block.1.transformer_blocks.0.attn2")


def test_only_the_first_rows_are_recorded_however_the_batch_is_chunked(denoiser):
    x, sigma, cond, _ = inputs(4)
    tap = AttentionTap(denoiser, "middle")
    with tap.recording(rows=3) as whole:
        denoiser(x, sigma, mapping_cond=cond)
    with tap.recording(rows=3) as chunked:
        for i in range(0, 4, 2):
            denoiser(x[i : i + 2], sigma[i : i + 2], mapping_cond=cond[i : i + 2])
    assert whole.saliency().shape == (3, 8, 12)
    torch.testing.assert_close(chunked.saliency(), whole.saliency(), rtol=1e-4, atol=1e-5)


def test_a_layer_that_does_not_run_is_an_error(denoiser):
    tap = AttentionTap(denoiser, "middle")
    with tap.recording(rows=2) as seen:
        pass
    with pytest.raises(RuntimeError, match="ran for 0 of 2 samples"):
        seen.saliency()


def test_hooks_record_nothing_outside_a_recording_and_leave_no_trace(denoiser, monkeypatch):
    before = {name: p.clone() for name, p in denoiser.state_dict().items()}
    x, sigma, cond, _ = inputs()
    plain = denoiser(x, sigma, mapping_cond=cond)
    monkeypatch.setattr(ksag.attention.tap, "attended", lambda *_: pytest.fail("recorded outside a recording"))
    tap = AttentionTap(denoiser, "middle")
    assert torch.equal(denoiser(x, sigma, mapping_cond=cond), plain)
    assert hooks(denoiser) > 0
    assert denoiser.state_dict().keys() == before.keys()
    tap.close()
    tap.close()
    assert hooks(denoiser) == 0


def test_an_error_in_the_middle_of_a_pass_leaves_nothing_recording(denoiser, monkeypatch):
    x, sigma, cond, _ = inputs()
    tap = AttentionTap(denoiser, "middle")
    fail = denoiser.inner_model.u_net.u_blocks[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), tap.recording(rows=2):
        denoiser(x, sigma, mapping_cond=cond)
    fail.remove()
    monkeypatch.setattr(ksag.attention.tap, "attended", lambda *_: pytest.fail("still recording"))
    denoiser(x, sigma, mapping_cond=cond)


def test_dropping_the_wrapper_removes_its_hooks(denoiser):
    guided = ksag.SAGDenoiser(denoiser)
    assert hooks(denoiser) > 0
    del guided
    gc.collect()
    assert hooks(denoiser) == 0


def test_a_copy_of_a_wrapped_model_works_on_its_own(denoiser):
    x, sigma, cond, uncond = inputs()
    guided = ksag.SAGDenoiser(denoiser, cond_key="mapping_cond")
    expected = guided(x, sigma, cond=cond, uncond=uncond)
    twin = copy.deepcopy(guided)
    guided.close()
    assert torch.equal(twin(x, sigma, cond=cond, uncond=uncond), expected)
    inner = copy.deepcopy(denoiser)
    assert torch.equal(inner(x, sigma, mapping_cond=cond), denoiser(x, sigma, mapping_cond=cond))


def test_two_wrappers_and_the_model_itself_between_calls(denoiser):
    x, sigma, cond, uncond = inputs()
    args = {"cond": cond, "uncond": uncond, "cond_scale": 2.0}

    def one():
        return ksag.SAGDenoiser(denoiser, 1.0, cond_key="mapping_cond")

    def other():
        return ksag.SAGDenoiser(denoiser, 2.0, cond_key="mapping_cond", attention="u_net.u_blocks.0.1")

    with one() as guided:
        expected = guided(x, sigma, **args)
    with other() as guided:
        expected_of_other = guided(x, sigma, **args)
    plain = denoiser(x, sigma, mapping_cond=cond)
    assert not torch.equal(expected, expected_of_other)
    with one() as guided, other() as guided_too:
        for _ in range(2):
            assert torch.equal(guided(x, sigma, **args), expected)
            assert torch.equal(denoiser(x, sigma, mapping_cond=cond), plain)
            assert torch.equal(guided_too(x, sigma, **args), expected_of_other)


def test_state_dict_to_and_half_are_as_if_the_model_were_not_wrapped(denoiser):
    x, sigma, cond, _ = (t.half() for t in inputs())
    twin = copy.deepcopy(denoiser).half()
    guided = ksag.SAGDenoiser(denoiser, cond_key="mapping_cond")
    assert denoiser.half().to("cpu", memory_format=torch.channels_last) is denoiser
    assert all(torch.equal(a, b) for a, b in zip(denoiser.state_dict().values(), twin.state_dict().values(), strict=True))
    assert denoiser.state_dict().keys() == twin.state_dict().keys()
    denoiser.load_state_dict(twin.state_dict())
    torch.testing.assert_close(denoiser(x, sigma, mapping_cond=cond), twin(x, sigma, mapping_cond=cond), rtol=1e-2, atol=1e-2)
    assert guided(x, sigma, cond=cond).dtype == torch.float16


def test_two_wrappers_on_one_model_in_two_threads(denoiser):
    x, sigma, cond, uncond = inputs()
    wrappers = [
        ksag.SAGDenoiser(denoiser, 1.0, cond_key="mapping_cond"),
        ksag.SAGDenoiser(denoiser, 2.0, cond_key="mapping_cond", attention="u_net.u_blocks.0.1"),
    ]
    jobs = [(guided, x + i) for guided in wrappers for i in range(2)]  # each wrapper in two threads as well
    alone = [guided(x, sigma, cond=cond, uncond=uncond) for guided, x in jobs]
    results = [[] for _ in jobs]
    barrier = threading.Barrier(len(jobs))

    def work(i):
        barrier.wait()
        for _ in range(5):
            results[i].append(jobs[i][0](jobs[i][1], sigma, cond=cond, uncond=uncond))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, got in zip(alone, results, strict=True):
        assert len(got) == 5
        for result in got:
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
