"""The forms that a GPU runs, on the processor where they can be."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semanticblur_core.network import SemanticBlur, decoder
from semanticblur_core.network import fused as module
from semanticblur_core.network.fused import FusedBottleneck, FusedConvReLU, conv_to_one, fuse
from semanticblur_core.network.resnet import BasicBlock, resnet_stages


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (2, 40)])
@torch.inference_mode()
def test_a_convolution_to_one_channel_is_a_product_and_a_sum(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    convolution = nn.Conv2d(5, 1, kernel_size=3, padding=1)
    x = torch.randn(2, 5, *size).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv_to_one(x, convolution), convolution(x), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_gpu_s_prediction_is_that_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    network = SemanticBlur().eval().for_inference()
    images = torch.randn(2, 3, 65, 97)
    here = network(images)
    taken = []

    def fused(
        x: Tensor, weight: Tensor, added: Tensor, factor: float, bias: Tensor, *geometry: Any
    ) -> Tensor:
        y = F.conv2d(x, weight, bias, *geometry)
        assert added.shape == y.shape
        assert factor or not added.any()
        taken.append(factor)
        return torch.relu(y + factor * added)

    def to_one(x: Tensor, convolution: nn.Conv2d) -> Tensor:
        taken.append(2.0)
        return conv_to_one(x, convolution)

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", fused)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Mock())
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(module, "_has_fused", lambda _: True)
    monkeypatch.setattr(decoder, "infers_on_gpu", lambda _: True)
    monkeypatch.setattr(decoder, "conv_to_one", to_one)
    torch.testing.assert_close(network(images), here, atol=1e-5, rtol=1e-4)
    # The stem, two in each of 16 blocks and the decoder's second; the blocks' third; the last.
    assert {factor: taken.count(factor) for factor in taken} == {0.0: 34, 1.0: 16, 2.0: 1}


@torch.inference_mode()
def test_what_cudnn_cannot_do_is_done_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Tensor:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    network = SemanticBlur().eval().for_inference()
    images = torch.randn(1, 3, 40, 40)
    here = network(images)
    refused: set[torch.dtype] = set()
    monkeypatch.setattr(module, "_REFUSED", refused)
    monkeypatch.setattr(module, "_has_fused", lambda x: x.dtype not in refused)
    monkeypatch.setattr(module, "_fused", refuses)
    assert torch.equal(network(images), here)
    assert refused == {torch.float32}


def test_blocks_of_other_networks_are_left_alone() -> None:
    """One of ResNet-34 uses its rectifier twice, after the sum too."""
    layer = resnet_stages(BasicBlock, (3, 1, 1, 1))[0][4]
    fuse(layer)
    assert not any(isinstance(m, FusedBottleneck | FusedConvReLU) for m in layer.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.05), (torch.bfloat16, 0.5)])
@torch.inference_mode()
def test_a_gpu_gives_the_processor_s_logits(dtype: torch.dtype, most: float) -> None:
    torch.manual_seed(3)
    network = SemanticBlur().eval()
    images = torch.randn(2, 3, 97, 65)
    expected = network(images)
    found = network.for_inference(dtype).cuda()(images.to("cuda", dtype)).float().cpu()
    assert float((found - expected).abs().max()) < most * float(expected.std())


def zeros_like_of(n: int) -> Tensor:
    return module._zeros(n, 3, 4, 5, like=torch.empty(0))


def test_zeros_are_found_only_once_they_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another stream would read them before."""
    kept: dict[Any, Tensor] = {}
    known = []
    stream = Mock()
    stream.synchronize = lambda: known.append(len(kept))
    monkeypatch.setattr(module, "_ZEROS", kept)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    first = zeros_like_of(2)
    assert zeros_like_of(1).data_ptr() == first.data_ptr()
    assert known == [0]
    assert first.shape == (2, 3, 4, 5)
    assert first.is_contiguous(memory_format=torch.channels_last)
    # Larger ones than these are for once.
    monkeypatch.setattr(module, "_MOST_KEPT_BYTES", first.nbytes)
    large = zeros_like_of(3)
    assert (large.shape, int(large.count_nonzero())) == ((3, 3, 4, 5), 0)
    assert large.is_contiguous(memory_format=torch.channels_last)
    [there] = kept.values()
    assert there.data_ptr() == first.data_ptr()


def test_zeros_of_one_gpu_or_of_all_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    kept = {(device, torch.float32): torch.zeros(1) for device in devices}
    monkeypatch.setattr(module, "_ZEROS", kept)
    module.release(torch.device("cpu"))
    module.release(devices[0])
    assert list(kept) == [(devices[1], torch.float32)]
    kept[devices[0], torch.bfloat16] = torch.zeros(1)
    module.release(torch.device("cuda"))
    assert not kept
