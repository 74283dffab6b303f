"""Literal transcription of equations 1-15 of the paper, for comparison with the fast form.

It reads the parameters of a ``SemanticBlur`` and applies them one equation at a time.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from semanticblur_core.network import SemanticBlur


def resize(x: Tensor, like: tuple[int, int]) -> Tensor:
    return interpolate(x, size=like, mode="bilinear", align_corners=False)


def reference_forward(model: SemanticBlur, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    features = model.backbone(images)  # eq. 1-3
    attended = []
    for i, f in enumerate(features):
        out = f
        if model.config.channel_attention:
            f_avg = f.mean(dim=(2, 3))  # eq. 4
            f_max = f.amax(dim=(2, 3))  # eq. 5
            mlp = model.channel_attention[i].mlp
            a_c = torch.sigmoid(mlp(f_avg) + mlp(f_max))  # eq. 6
            out = out * a_c[:, :, None, None]
        if model.config.spatial_attention:
            s = torch.cat([f.mean(1, keepdim=True), f.amax(1, keepdim=True)], dim=1)  # eq. 7
            a_s = torch.sigmoid(model.spatial_attention[i].conv(s))  # eq. 8
            out = out * a_s  # eq. 9
        attended.append(out)
    final = attended
    if model.semantic is not None:
        size3 = attended[2].shape[-2:]
        both = torch.cat([attended[2], resize(attended[3], size3)], dim=1)
        s_sem = model.semantic.reduce(both)  # eq. 10
        final = [
            f + model.semantic.alpha * resize(project(s_sem), f.shape[-2:])  # eq. 11
            for f, project in zip(attended, model.semantic.project, strict=True)
        ]
    decoder = model.decoder
    pyramid = [decoder.lateral[3](final[3])]  # eq. 12
    for i in (2, 1, 0):  # eq. 13
        lateral = decoder.lateral[i](final[i])
        pyramid.insert(0, lateral + resize(pyramid[0], lateral.shape[-2:]))
    fused = sum(
        beta * resize(p, (height, width)) for beta, p in zip(decoder.beta, pyramid, strict=True)
    )  # eq. 14
    x = torch.relu(decoder.norm1(conv2d(fused, decoder.conv1.weight, decoder.conv1.bias)))
    x = torch.relu(decoder.norm2(decoder.conv2(x)))
    return decoder.conv3(x)  # eq. 15
