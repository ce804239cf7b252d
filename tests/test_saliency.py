import pytest
import torch
from measure import peak_bytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ksag.attention.saliency
from ksag.attention.saliency import saliency


def dense(q, k, scale):
    """The definition, written out in float64: mean over heads, sum over queries, mean over tokens 1."""
    attention = torch.softmax(torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * scale, dim=-1)
    return attention.mean(1).sum(1) * k.shape[2] / q.shape[2]


@pytest.mark.parametrize("budget", [ksag.attention.saliency.MAX_LOGITS, 1000, 1])
def test_is_the_same_in_any_chunks(monkeypatch, budget):
    monkeypatch.setattr(ksag.attention.saliency, "MAX_LOGITS", budget)
    q, k = torch.randn(3, 2, 35, 16), torch.randn(3, 2, 35, 16)
    torch.testing.assert_close(saliency(q, k, 0.25).double(), dense(q, k, 0.25), rtol=1e-5, atol=0)


# in half precision to float32; in float32 only those of a batch, whose heads do not lie in a row
@pytest.mark.parametrize(
    ("b", "dtype", "times"), [(1, torch.float32, 0), (1, torch.float16, 2), (3, torch.float32, 2), (3, torch.float16, 2)]
)
def test_queries_and_keys_are_copied_once_and_not_for_each_chunk(monkeypatch, b, dtype, times):
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.clone):
                copies.append(result.numel())
            return result

    copies: list[int] = []
    monkeypatch.setattr(ksag.attention.saliency, "MAX_LOGITS", b * 2 * 32 * 8)  # four chunks
    q, k = (torch.randn(b, 32, 2, 16).to(dtype).transpose(1, 2) for _ in range(2))  # as layers give them
    with Sizes():
        saliency(q, k, 0.25)
    assert copies == [q.numel()] * times


def test_mean_over_tokens_is_one():
    q, k = torch.randn(2, 4, 64, 8) * 5, torch.randn(2, 4, 64, 8) * 5
    torch.testing.assert_close(saliency(q, k, 8**-0.5).mean(1), torch.ones(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    # Logits of about 1e5 overflow float16 and would come out as NaN
    q, k = (torch.randn(1, 2, 16, 8) * 200).to(dtype), (torch.randn(1, 2, 16, 8) * 200).to(dtype)
    result = saliency(q, k, 1.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), dense(q, k, 1.0), rtol=1e-4, atol=1e-4)


def test_autocast_does_not_lower_the_precision():
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    expected = saliency(q, k, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(saliency(q, k, 1.0), expected)


def test_never_holds_the_whole_attention(monkeypatch):
    monkeypatch.setattr(ksag.attention.saliency, "MAX_LOGITS", 4096)
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                sizes.append(out.numel())
            return out

    q, k = torch.randn(1, 2, 256, 4), torch.randn(1, 2, 256, 4)
    with Watch():
        saliency(q, k, 0.5)
    assert max(sizes) <= 4096 < 2 * 256 * 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("tokens", [256, 1024])
def test_its_working_set_is_bounded(monkeypatch, tokens, b, dtype):
    monkeypatch.setattr(ksag.attention.saliency, "MAX_LOGITS", 2**16)
    q, k = (torch.randn(b, tokens, 4, 16).to(dtype).transpose(1, 2) for _ in range(2))
    received, copies = 4 * b * tokens, 4 * (q.numel() + k.numel())
    assert peak_bytes(lambda: saliency(q, k, 0.25), q.device) <= 2 * 4 * 2**16 + 4 * received + copies


@pytest.fixture
def flash_on_a_cpu(monkeypatch):
    """Imitates a GPU's operator of flash attention by the one that PyTorch has for a CPU; counts the heads of each call."""
    aten, heads = torch.ops.aten, []

    def forward(q, k, v, *, scale):
        heads.append(q.shape[1])
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)

    monkeypatch.setattr(aten, "_scaled_dot_product_flash_attention", forward)
    monkeypatch.setattr(ksag.attention.saliency, "_can_use_flash", lambda *_: True)
    monkeypatch.setattr(ksag.attention.saliency, "MAX_ELEMENTS", 3 * 2 * 48 * 24)  # three heads at once
    return heads


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("spread", [1.0, 20.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-5), (torch.bfloat16, 2e-5)])
def test_flash_attentions_sums_are_the_definition(flash_on_a_cpu, dtype, tolerance, spread, autocast):
    q, k = (spread * torch.randn(2, tokens, 8, 16).to(dtype).transpose(1, 2) for tokens in (35, 48))
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        result = saliency(q, k, 0.25)
    assert flash_on_a_cpu == [3, 3, 3, 3, 2, 2] and result.dtype == torch.float32
    torch.testing.assert_close(result.double(), dense(q, k, 0.25), rtol=tolerance if spread == 1 else 1e-4, atol=1e-6)
    torch.testing.assert_close(result.mean(1), torch.ones(2), rtol=1e-6, atol=0)


def test_flash_attention_takes_logits_that_float16_does_not_hold(flash_on_a_cpu):
    q, k = (100 * torch.randn(2, tokens, 8, 16).half().transpose(1, 2) for tokens in (35, 48))
    assert (q.double() @ k.double().mT).abs().max() > 2 * torch.finfo(torch.float16).max
    torch.testing.assert_close(saliency(q, k, 0.25).double(), dense(q, k, 0.25), rtol=0.05, atol=1e-3)


def test_what_goes_through_flash_attention(monkeypatch):
    """On a GPU, of which FakeTensorMode has the tensors without their values."""
    params = []
    monkeypatch.setattr(ksag.attention.saliency, "SDPAParams", lambda *given: given)
    monkeypatch.setattr(ksag.attention.saliency, "can_use_flash_attention", lambda given: params.append(given[0]) is None)

    def goes(heads=8, tokens=2048, dim=64, device="cuda", mask=None, turned=False):
        q = torch.empty(1, heads, tokens, dim, dtype=torch.float16, device=device)
        k = torch.empty(1, heads, dim, tokens, dtype=torch.float16, device=device).mT if turned else q
        return ksag.attention.saliency._can_use_flash(q, k, mask)

    with FakeTensorMode():
        assert goes() and params[0].shape[-1] == 72  # what the kernel gets is wider
        refused = {"tokens": 512}, {"dim": 60}, {"device": "cpu"}, {"mask": torch.empty(1)}, {"turned": True}
        assert not any(goes(**one) for one in refused) and len(params) == 1


def test_the_operator_of_flash_attention_takes_and_returns_what_is_expected():
    """Which PyTorch may change, and which only a GPU has."""
    schema = torch.ops.aten._scaled_dot_product_flash_attention.default._schema
    assert [one.name for one in schema.returns][:2] == ["output", "logsumexp"]
    assert [one.name for one in schema.arguments][:3] == ["query", "key", "value"] and schema.arguments[-1].name == "scale"
