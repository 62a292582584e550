"""A step of training a residual network of ResNet-50's shapes: with torch's layers, compiled, and converted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import evenorm
from evenorm.bench.contenders import compiled

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Size:
    """How large the network and its input are."""

    batch: int = 256
    side: int = 224
    width: int = 64
    blocks: Sequence[int] = (3, 4, 6, 3)
    classes: int = 1000


class _Bottleneck(nn.Module):
    """Three convolutions, each with its batch norm, and a way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.around = nn.Sequential()
        if stride > 1 or channels != 4 * width:
            convolution = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.around = nn.Sequential(convolution, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.around(x))


def residual_network(size: Size) -> nn.Module:
    """Return the network, as one writes it with torch.nn."""
    stages: list[nn.Module] = []
    channels = size.width
    for stage, depth in enumerate(size.blocks):
        width = size.width * 2**stage
        for block in range(depth):
            stages.append(_Bottleneck(channels, width, 2 if stage > 0 and block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(
        nn.Conv2d(3, size.width, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(size.width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, size.classes),
    )


def contenders(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield copies of a network, of the same weights: ours, torch's, and both compiled."""
    converted = evenorm.convert(fx.symbolic_trace(copy.deepcopy(network)))  # traced, so that additions are taken in
    yield "ours", converted
    yield "eager", copy.deepcopy(network)
    yield "compiled", compiled(copy.deepcopy(network))
    yield "ours, compiled", compiled(copy.deepcopy(converted))


def make_step(network: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return a call that trains by one step and returns the loss; half precision by autocast."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype in HALF):
            loss = functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def make_steps(size: Size, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Tensor]]:
    """Return each contender's step on the same images, channels last."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(size.batch, 3, size.side, size.side, generator=generator, device=device)
    labels = torch.randint(size.classes, (size.batch,), generator=generator, device=device)
    torch.manual_seed(0)
    network = residual_network(size).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # unknown to torch's own types
    images = images.contiguous(memory_format=torch.channels_last)
    return {name: make_step(one, images, labels, dtype) for name, one in contenders(network)}
