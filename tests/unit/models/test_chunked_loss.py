"""The loss in chunks on one rank: what it leaves in the engine's gradient buffer, and what stands in memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from megatron_syne.config.schema import MemoryConfig, ModelConfig, RunConfig  # noqa: E402
from megatron_syne.models import chunked_loss as chunks  # noqa: E402

TOKENS, HIDDEN, VOCABULARY, ROWS = 21, 16, 37, 40
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def head(chunk: int = 4) -> chunks.Head:
    return chunks.Head(chunk, 0, VOCABULARY, 0.0, False, ALONE, False)


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch):
    """(hidden, weight as the engine's DDP leaves it, labels, gradient of the weight by autograd in fp64)."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, 1, HIDDEN)
    weight = torch.nn.Parameter(torch.randn(ROWS, HIDDEN))
    labels = torch.randint(0, VOCABULARY, (1, TOKENS))
    matrix = weight.detach().double().requires_grad_()
    logits = hidden[:, 0].double() @ matrix[:VOCABULARY].t()
    torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum").backward()
    weight.main_grad = torch.ones(ROWS, HIDDEN)
    weight.grad_added_to_main_grad = False
    return hidden.requires_grad_(), weight, labels, matrix.grad


def test_gradient_goes_into_the_engine_s_buffer(problem) -> None:
    hidden, weight, labels, expected = problem
    ran = []
    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *_: ran.append(weight.grad))
    chunks.chunked_loss(hidden, weight, labels, head()).sum().backward()
    assert weight.grad_added_to_main_grad
    assert (weight.main_grad - 1.0 - expected).abs().max() <= 1e-5
    assert len(ran) == 1, "the engine's hook runs once"
    assert ran[0].shape == weight.shape
    assert ran[0].data_ptr() == weight.data_ptr(), "no memory for a gradient that nobody reads"


def test_where_the_embedding_is_the_same_parameter_its_gradient_comes_alone(problem) -> None:
    hidden, weight, labels, expected = problem
    weight.zero_out_wgrad = True
    embedded = torch.nn.functional.embedding(labels, weight)
    (chunks.chunked_loss(hidden, weight, labels, head()).sum() + embedded.sum()).backward()
    of_embedding = torch.zeros_like(weight).index_add_(0, labels[0], torch.ones(TOKENS, HIDDEN))
    assert torch.equal(weight.grad, of_embedding)
    assert (weight.main_grad - 1.0 - expected).abs().max() <= 1e-5


def test_bf16_sums_chunks_in_the_buffer_s_format(problem) -> None:
    hidden, weight, labels, expected = problem
    low = torch.nn.Parameter(weight.detach().bfloat16())
    low.main_grad, low.grad_added_to_main_grad = torch.zeros(ROWS, HIDDEN), False
    loss = chunks.chunked_loss(hidden.detach().bfloat16(), low, labels, head(1))
    assert loss.dtype is torch.float32
    loss.sum().backward()
    error = (low.main_grad - expected).norm() / expected.norm()
    assert 1e-5 < error < 1e-2
    assert not torch.equal(low.main_grad, low.main_grad.bfloat16().float()), "fp32 sums, not of bf16"


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(problem, frozen: str) -> None:
    hidden, weight, labels, expected = problem
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    chunks.chunked_loss(hidden, weight, labels, head()).sum().backward()
    if frozen == "weight":
        assert torch.equal(weight.main_grad, torch.ones(ROWS, HIDDEN))
        assert hidden.grad.norm() > 1
    else:
        assert hidden.grad is None
        assert (weight.main_grad - 1.0 - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("chunk", [4, 21, 100])
def test_no_tensor_is_larger_than_a_chunk_of_logits(problem, chunk: int) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(
                x.numel() for x in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(x)
            )
            return result

    hidden, weight, labels, _ = problem
    with Sizes():
        chunks.chunked_loss(hidden, weight, labels, head(chunk)).sum().backward()
    assert max(sizes) == max(min(chunk, TOKENS) * VOCABULARY, ROWS * HIDDEN)


def test_without_labels_the_model_gives_its_logits() -> None:
    class Layer(torch.nn.Module):
        tp_group, sequence_parallel = ALONE, False

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(ROWS, HIDDEN))

        def forward(self, input_, weight=None, runtime_gather_output=None):
            return input_ @ self.weight.t(), None

    layer = Layer()
    called = []
    layer.register_forward_pre_hook(lambda *_: called.append(1))

    def postprocess(*, hidden_states, labels, mtp_in_postprocess):
        assert labels is None
        return layer(hidden_states)[0]

    gpt = SimpleNamespace(
        post_process=True,
        training=True,
        output_layer=layer,
        share_embeddings_and_output_weights=False,
        config=SimpleNamespace(cross_entropy_loss_fusion=False),
        _postprocess=postprocess,
    )
    config = RunConfig(memory=MemoryConfig(loss_chunk_tokens=5))
    chunks.install_chunked_loss(gpt, config, ModelConfig(vocab_size=VOCABULARY))
    hidden = torch.randn(6, 2, HIDDEN)
    whole = gpt._postprocess(hidden_states=hidden, labels=None, mtp_in_postprocess=False)
    assert torch.equal(whole, hidden @ layer.weight.t())
    labels = torch.randint(0, VOCABULARY, (2, 6))
    losses = gpt._postprocess(hidden_states=hidden, labels=labels, mtp_in_postprocess=False)
    expected = torch.nn.functional.cross_entropy(
        whole[..., :VOCABULARY].permute(1, 2, 0), labels, reduction="none"
    )
    assert losses.shape == (2, 6)
    assert torch.allclose(losses, expected, atol=1e-5)
    assert called == [1, 1], "the engine awaits gathered parameters by a hook on the layer's call"


@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
def test_product_is_summed_in_the_buffer_s_format(into: torch.dtype) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(50, 8).bfloat16(), torch.randn(50, 6).bfloat16()
    buffer = torch.full((8, 6), 3.0, dtype=into)
    chunks.add_product(buffer, a, b)
    exact = 3.0 + a.double().t() @ b.double()
    assert (buffer - exact).abs().max() <= (1e-5 if into is torch.float32 else 0.1)
