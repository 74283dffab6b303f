"""The forms that a GPU runs, on the processor where they can be."""

import pytest
import torch
from torch import nn
from torchvision import models

from semanticblur_core.network import SemanticBlur, decoder
from semanticblur_core.network.fused import FusedBottleneck, FusedConvReLU, conv_to_one, fuse


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
    monkeypatch.setattr(decoder, "runs_on_gpu", lambda _: True)
    torch.testing.assert_close(network(images), here, atol=1e-5, rtol=1e-4)


def test_what_is_rectified_elsewhere_is_left_alone() -> None:
    """A block of ResNet-34 uses its rectifier twice, after the sum too."""
    net = models.resnet34()
    fuse(net.layer1)
    assert not any(isinstance(module, FusedConvReLU) for module in net.layer1.modules())
    network = SemanticBlur().eval().for_inference()
    blocks = [m for m in network.modules() if isinstance(m, FusedBottleneck)]
    assert len(blocks) == 16
    assert sum(isinstance(m, FusedConvReLU) for m in network.modules()) == 1  # the stem's


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
