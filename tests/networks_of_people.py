"""Small networks of the kinds that people have, each with an input.

Annotations are not postponed here: torch.fx copies them into its graphs, and cannot pickle those that are strings.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """A residual block; one ReLU module serves three places, as in the usual code."""

    def __init__(self, wide: int, narrow: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(wide, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Bottleneck(8, 4), Bottleneck(8, 4, stride=2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, 2, 1)
        self.fc2 = nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * functional.hardsigmoid(self.fc2(functional.relu(self.fc1(functional.adaptive_avg_pool2d(x, 1)))))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()),
            nn.Sequential(
                nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()
            ),
            SqueezeExcite(wide),
            nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def mobilenet() -> nn.Module:
    stem = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6, eps=1e-3, momentum=0.01), nn.Hardswish()
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.Dropout(0.2))
    return nn.Sequential(stem, InvertedResidual(6, 12), InvertedResidual(6, 12), head)


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.layers = nn.ModuleList([DenseLayer(4 + 3 * i, 3) for i in range(3)])
        self.transition = nn.Sequential(nn.BatchNorm2d(13), nn.ReLU(), nn.Conv2d(13, 6, 1), nn.AvgPool2d(2))
        self.norm5 = nn.BatchNorm2d(6)
        self.classifier = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = functional.relu(self.norm5(self.transition(torch.cat(features, 1))), inplace=True)
        return self.classifier(x.mean((2, 3)))


def double(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
        nn.Conv2d(outside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = double(3, 4), double(4, 8), double(8, 8)
        self.up2 = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.up2_norm = nn.BatchNorm2d(8)
        self.join2 = double(16, 4)
        self.up1 = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
        self.join1 = double(8, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(functional.max_pool2d(first, 2))
        x = self.up2_norm(self.up2(self.bottom(functional.max_pool2d(second, 2))))
        x = self.join2(torch.cat([second, x], 1))
        return self.head(self.join1(torch.cat([first, self.up1(x)], 1)))


class PointNet(nn.Module):
    """(N, 3, L) points; convolutions of width 1, the maximum over the points, then rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 16, 1), nn.BatchNorm1d(16)
        self.fc1, self.bn3 = nn.Linear(16, 8), nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.fc2 = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x)).max(2)[0]
        return functional.log_softmax(self.fc2(functional.relu(self.bn3(self.dropout(self.fc1(x))))), dim=1)


def table_mlp() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(6),
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.SiLU(),
        nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.GELU(approximate="tanh"), nn.Dropout(0.1),
        nn.Linear(16, 1),
    )  # fmt: skip


class Recurrent(nn.Module):
    """An LSTM beside batch norm, which sees its output as (N, C, L); two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_in = nn.BatchNorm1d(4, momentum=None)
        self.lstm = nn.LSTM(4, 6, batch_first=True, bidirectional=True)
        self.norm = nn.BatchNorm1d(12, affine=False)
        self.act = nn.ELU(alpha=0.7)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm_in(x.transpose(1, 2)).transpose(1, 2)
        sequence, (state, _) = self.lstm(x)
        normed = self.act(self.norm(sequence.transpose(1, 2)))
        return {"scores": self.head(normed.mean(2)), "state": state}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.bn(self.conv(x))).mean((2, 3)))


IMAGES, POINTS, ROWS, SERIES = (4, 3, 8, 8), (4, 3, 12), (16, 6), (4, 7, 4)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (ResNet, IMAGES),
    "mobilenet": (mobilenet, IMAGES),
    "densenet": (DenseNet, IMAGES),
    "unet": (UNet, IMAGES),
    "pointnet": (PointNet, POINTS),
    "table_mlp": (table_mlp, ROWS),
    "recurrent": (Recurrent, SERIES),
    "functional": (Functional, IMAGES),
}


def trained(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network in evaluation whose parameters and statistics are not those it began with, and an input."""
    make, shape = NETWORKS[name]
    torch.manual_seed(sum(map(ord, name)))
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            shake_(module)
    return model.eval(), torch.randn(shape)


def shake_(layer: nn.Module) -> None:
    """Give a batch norm layer parameters and statistics with nothing special about them, in place."""
    with torch.no_grad():
        if layer.affine:
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(0, 0.3)
        if layer.running_mean is not None:
            layer.running_mean.normal_(0, 0.5)
            layer.running_var.uniform_(0.5, 2)
            layer.num_batches_tracked.fill_(7)
