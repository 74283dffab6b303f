"""The residual networks against torchvision's."""

import pytest
import torch
from torch import nn
from torchvision import models

from semanticblur_core.network.resnet import BasicBlock, Bottleneck, resnet_stages


@pytest.mark.parametrize(("name", "block"), [("resnet34", BasicBlock), ("resnet50", Bottleneck)])
@torch.inference_mode()
def test_stages_are_torchvision_s(name: str, block: type[BasicBlock | Bottleneck]) -> None:
    torch.manual_seed(1)
    theirs = getattr(models, name)().eval()
    stem = nn.Sequential(theirs.conv1, theirs.bn1, theirs.relu, theirs.maxpool, theirs.layer1)
    whole = nn.Sequential(stem, theirs.layer2, theirs.layer3, theirs.layer4)
    ours = nn.Sequential(*resnet_stages(block, (3, 4, 6, 3))).eval()
    # Drawn as theirs are, from other random numbers.
    state = ours.state_dict()
    for key, values in whole.state_dict().items():
        assert values.shape == state[key].shape
        if values.dim() == 4:
            assert state[key].std() / values.std() == pytest.approx(1, abs=0.1)
            assert not torch.equal(state[key], values)
        else:
            assert torch.equal(state[key], values)
    for module in whole.modules():  # or the layers after the first would see much the same
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
    ours.load_state_dict(whole.state_dict())
    images = torch.randn(2, 3, 71, 97)
    torch.testing.assert_close(ours(images), whole(images))
