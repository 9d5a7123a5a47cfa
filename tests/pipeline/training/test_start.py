"""The prepared start: what each part promises, on the weights themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import UsageError
from pipeline.models.lite import inception_resnet_lite
from pipeline.training.start import classifier, prepare


def images(n: int = 64, side: int = 16) -> torch.Tensor:
    """Smooth and coloured alike in all channels, as photographs are: patches are far from white."""
    noise = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)
    return 3 * (smooth + smooth.mean(1, keepdim=True))


def test_the_first_convolution_whitens_the_patches() -> None:
    model = inception_resnet_lite(10, small_input=True)
    prepare(model, images(), head_scale=1.0)
    first = model.stem[0].conv
    assert isinstance(first, nn.Conv2d)
    responses = first(images()).transpose(0, 1).reshape(first.out_channels, -1)
    ahead, back = responses[:12], responses[12:24]
    torch.testing.assert_close(back, -ahead)
    # Unit variance but for the floor under the weakest directions, and no two alike.
    covariance = torch.cov(ahead)
    torch.testing.assert_close(covariance, torch.eye(12), atol=0.02, rtol=0)


def test_convolutions_that_do_not_narrow_pass_their_input_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1), nn.Flatten(), nn.Linear(12, 2))
    prepare(model, images(), head_scale=1.0)
    x = torch.randn(2, 8, 5, 5)
    second = model[1]
    assert isinstance(second, nn.Conv2d)
    assert second.bias is not None
    torch.testing.assert_close(second(x)[:, :8], x + second.bias[:8].view(1, -1, 1, 1))


def test_norms_keep_their_scale_and_the_classifier_starts_small() -> None:
    model = inception_resnet_lite(10, small_input=True)
    before = model.head.weight.detach().clone()
    prepare(model, images(), head_scale=0.25)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.weight.requires_grad for norm in norms)
    assert all(norm.bias.requires_grad for norm in norms)
    torch.testing.assert_close(model.head.weight.detach(), before / 4)
    assert not model.head.bias.any()


def test_a_network_without_a_classifier_is_refused() -> None:
    with pytest.raises(UsageError, match="--recipe modern"):
        classifier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)))
