"""The network against the equations of the paper and its parameter counts."""

import copy
import itertools

import pytest
import torch
from reference_network import reference_forward
from torch import Tensor, nn

from semanticblur_core.config import ModelConfig
from semanticblur_core.data.transforms import normalise
from semanticblur_core.errors import ConfigError
from semanticblur_core.inference.export import _ExportForm
from semanticblur_core.network import SemanticBlur
from semanticblur_core.network.resize import resize

SWITCHES = ("channel_attention", "spatial_attention", "semantic_enhancement")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def lively(config: ModelConfig, seed: int = 3) -> SemanticBlur:
    """A network in evaluation mode whose every parameter and statistic matters to the output."""
    torch.manual_seed(seed)
    model = SemanticBlur(config)
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(2, 3, 80, 96))
        if model.semantic is not None:
            model.semantic.alpha.fill_(0.8)
        model.decoder.beta.copy_(torch.tensor([0.4, -0.3, 0.7, 0.2]))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.uniform_(-0.1, 0.1)
    return model.eval()


def spread(x: Tensor) -> float:
    return float(x.max() - x.min())


@pytest.fixture(scope="module")
def default_model() -> SemanticBlur:
    return lively(ModelConfig())


def test_parameter_counts_are_those_of_the_paper(default_model: SemanticBlur) -> None:
    assert count(default_model) == 25_280_866  # 25.3 M in Table 2
    assert count(default_model.backbone) == 23_508_032  # 23.5 M
    assert count(default_model.channel_attention) == 696_320  # "+0.7 M"
    assert count(default_model.spatial_attention) == 396


@pytest.mark.parametrize("on", list(itertools.product((True, False), repeat=3)))
@torch.inference_mode()
def test_fast_form_equals_the_equations_for_every_switch(on: tuple[bool, ...]) -> None:
    model = lively(ModelConfig(**dict(zip(SWITCHES, on, strict=True)), backbone="resnet34"))
    images = torch.randn(2, 3, 101, 67)
    expected = reference_forward(model, images)
    for fast in (model, model.for_inference()):
        error = (fast(images) - expected).abs().max()
        assert float(error) < 1e-4 * spread(expected)


@pytest.mark.parametrize(
    "config",
    [
        *(
            ModelConfig(**dict(zip(SWITCHES, on, strict=True)), backbone="resnet34")
            for on in itertools.product((True, False), repeat=3)
        ),
        ModelConfig(backbone="vgg16"),
        ModelConfig(backbone="efficientnet_b4"),
        ModelConfig(output_stride=8),
    ],
)
@torch.inference_mode()
def test_exported_form_equals_the_network(config: ModelConfig) -> None:
    model = lively(config)
    images = torch.rand(2, 3, 101, 67)
    expected = model(normalise(images))
    error = (torch.logit(_ExportForm(model)(images).double()) - expected).abs().max()
    assert float(error) < 1e-4 * spread(expected)


@pytest.mark.parametrize("backbone", ["vgg16", "resnet34", "resnet50", "efficientnet_b4"])
@torch.inference_mode()
def test_fast_form_equals_the_equations_for_every_backbone(backbone: str) -> None:
    model = lively(ModelConfig(backbone=backbone))
    for size in ((64, 96), (33, 47)):
        images = torch.randn(1, 3, *size)
        expected = reference_forward(model, images)
        assert expected.shape == (1, 1, *size)
        for fast in (model, model.for_inference()):
            assert float((fast(images) - expected).abs().max()) < 1e-4 * spread(expected)


@pytest.mark.parametrize("stride", [8, 16])
@torch.inference_mode()
def test_output_stride_keeps_resolution_and_parameters(stride: int) -> None:
    model = lively(ModelConfig(output_stride=stride))
    images = torch.randn(1, 3, 96, 64)
    features = model.backbone(images)
    assert features[-1].shape[-2:] == (96 // stride, 64 // stride)
    assert count(model) == 25_280_866
    expected = reference_forward(model, images)
    assert float((model(images) - expected).abs().max()) < 1e-4 * spread(expected)


@torch.inference_mode()
@pytest.mark.parametrize("backbone", ["vgg16", "resnet34", "resnet50", "efficientnet_b4"])
def test_taps_have_the_documented_strides_widths_and_dilation(backbone: str) -> None:
    net = SemanticBlur(ModelConfig(backbone=backbone)).backbone.eval()
    features = net(torch.zeros(1, 3, 128, 160))
    assert [tuple(f.shape[-2:]) for f in features] == [(32, 40), (16, 20), (8, 10), (4, 5)]
    assert tuple(f.shape[1] for f in features) == net.channels


def dilated(model: SemanticBlur) -> dict[str, int]:
    """Rates of the backbone's convolutions that are dilated, by name."""
    return {
        name: module.dilation[0]
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1)
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"stages.3.0.conv2": 2, "stages.3.1.conv2": 4, "stages.3.2.conv2": 8}),
        (
            {"output_stride": 16},
            {"stages.3.0.conv2": 2, "stages.3.1.conv2": 4, "stages.3.2.conv2": 8},
        ),
        (
            {"output_stride": 8},
            {f"stages.2.{i}.conv2": 2 for i in range(6)}
            | {"stages.3.0.conv2": 4, "stages.3.1.conv2": 8, "stages.3.2.conv2": 16},
        ),
        (
            {"backbone": "resnet34"},
            {f"stages.3.{i}.conv{j}": 2 ** (i + 1) for i in range(3) for j in (1, 2)},
        ),
        ({"backbone": "vgg16"}, {"stages.3.24": 2, "stages.3.26": 4, "stages.3.28": 8}),
        (
            {"backbone": "efficientnet_b4"},
            {
                "stages.3.6.7.block.1.0": 2,
                "stages.3.7.0.block.1.0": 4,
                "stages.3.7.1.block.1.0": 8,
            },
        ),
    ],
)
def test_dilation_is_where_the_documentation_says(
    settings: dict[str, object], expected: dict[str, int]
) -> None:
    with torch.device("meta"):
        assert dilated(SemanticBlur(ModelConfig.from_dict(settings))) == expected


def test_a_network_made_for_inference_is_not_made_so_twice(default_model: SemanticBlur) -> None:
    with pytest.raises(ValueError, match="for inference already"):
        default_model.for_inference().for_inference()


def test_training_works_after_inference_at_the_same_size() -> None:
    model = lively(ModelConfig(backbone="resnet34"))
    images = torch.randn(1, 3, 72, 72)
    with torch.inference_mode():
        model.for_inference()(images)
    model.train()
    model(torch.cat([images, images])).mean().backward()
    assert model.decoder.beta.grad is not None


def test_gradients_equal_those_of_the_equations() -> None:
    # In double precision: in float32 the deep layers' gradients differ by rounding alone.
    model = lively(ModelConfig(backbone="resnet34")).double().eval()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    target = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    gradients = []
    for forward in (model, lambda x: reference_forward(model, x)):
        model.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(forward(images), target).backward()
        gradients.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        scale = float(expected.abs().max())
        assert float((gradients[0][name] - expected).abs().max()) <= 1e-4 * scale + 1e-9, name


@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch(default_model: SemanticBlur) -> None:
    images = torch.randn(3, 3, 65, 80)
    together = default_model(images)
    for i in range(3):
        alone = default_model(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-3 * spread(together), rtol=0)


@torch.inference_mode()
def test_bfloat16_inference_stays_close(default_model: SemanticBlur) -> None:
    images = torch.randn(1, 3, 96, 96)
    exact = default_model(images)
    rough = default_model.for_inference(torch.bfloat16)(images.bfloat16()).float()
    assert float((exact - rough).abs().mean()) < 0.02 * spread(exact)
    assert float(torch.corrcoef(torch.stack([exact.flatten(), rough.flatten()]))[0, 1]) > 0.99


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 64, 64), r"\(N, 3, H, W\), got \(1, 1, 64, 64\)"),
        ((3, 64, 64), r"got \(3, 64, 64\)"),
        ((1, 3, 32, 64), "at least 33 x 33 px, got 32 x 64"),
    ],
)
def test_wrong_input_is_refused(
    default_model: SemanticBlur, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        default_model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "alexnet"}, "alexnet"),
        ({"output_stride": 4}, "expected 8, 16 or 32, got 4"),
        ({"output_stride": 8, "backbone": "vgg16"}, "only resnet50"),
        ({"semantic_channels": 0}, "semantic_channels"),
        ({"depth": 3}, "unknown setting depth"),
    ],
)
def test_wrong_configuration_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("source", "size"), [((5, 7), (20, 28)), ((9, 4), (5, 3)), ((6, 6), (6, 11))]
)
def test_resize_is_bilinear_interpolation(source: tuple[int, int], size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *source)
    expected = nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
    got = resize(x.permute(0, 2, 3, 1).contiguous(), *size).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_normalisations_of_several_gpus_are_folded_too(default_model: SemanticBlur) -> None:
    x = torch.rand(1, 3, 64, 64)
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(default_model))
    with torch.inference_mode():
        expected = default_model.for_inference(torch.float32)(x)
        torch.testing.assert_close(synchronised.for_inference(torch.float32)(x), expected)
