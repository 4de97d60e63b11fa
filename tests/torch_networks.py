"""The networks in PyTorch, with the names that released checkpoints have: what converted weights must agree with."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Basic (two convolutions) or bottleneck (three) residual block, activation behind."""

    def __init__(self, inside, width, stride, expansion):
        super().__init__()
        sizes = [(1, 1), (3, stride), (1, 1)] if expansion > 1 else [(3, stride), (3, 1)]
        widths = [width] * (len(sizes) - 1) + [width * expansion]
        for i, ((size, s), out) in enumerate(zip(sizes, widths, strict=True), start=1):
            before = inside if i == 1 else widths[i - 2]
            setattr(self, f"conv{i}", nn.Conv2d(before, out, size, s, size // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(out))
        self.depth, self.downsample = len(sizes), None
        if stride > 1 or inside != widths[-1]:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, widths[-1], 1, stride, bias=False), nn.BatchNorm2d(widths[-1])
            )

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.depth else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, stages, width, stem, stem_norm=True, expansion=1, num_classes=10):
        super().__init__()
        self.imagenet = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, width, *((7, 2, 3) if self.imagenet else (3, 1, 1)), bias=False)
        if stem_norm:
            self.bn1 = nn.BatchNorm2d(width)
        inside = width
        for i, count in enumerate(stages):
            blocks = []
            for j in range(count):
                blocks.append(Block(inside, width * 2**i, 2 if i and not j else 1, expansion))
                inside = width * 2**i * expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.stages, self.fc = len(stages), nn.Linear(inside, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(self.bn1(x) if hasattr(self, "bn1") else x)
        x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, inside, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(inside, width, 1, stride, bias=False) if inside != width else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class Group(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, depth, widen, num_classes=10):
        super().__init__()
        self.conv1, inside = nn.Conv2d(3, 16, 3, 1, 1, bias=False), 16
        for i in range(3):
            width, blocks = 16 * widen * 2**i, []
            for j in range((depth - 4) // 6):
                blocks.append(WideBlock(inside, width, 2 if i and not j else 1))
                inside = width
            setattr(self, f"block{i + 1}", Group(*blocks))
        self.bn1, self.fc = nn.BatchNorm2d(inside), nn.Linear(inside, num_classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow does."""

    def __init__(self, inside, out, size, stride=1, groups=1):
        super().__init__(inside, out, size, stride, groups=groups, bias=False)

    def forward(self, x):
        padding = []
        for length, size, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            total = max((-(-length // stride) - 1) * stride + size - length, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


class MobileBlock(nn.Module):
    def __init__(self, inside, out, size, stride, expansion):
        super().__init__()
        width, norm = inside * expansion, lambda count: nn.BatchNorm2d(count, eps=1e-3)
        if expansion > 1:
            self._expand_conv, self._bn0 = SameConv(inside, width, 1), norm(width)
        self._depthwise_conv, self._bn1 = SameConv(width, width, size, stride, groups=width), norm(width)
        self._project_conv, self._bn2 = SameConv(width, out, 1), norm(out)
        self.shortcut = inside == out and stride == 1

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """Stages: blocks, kernel size, stride, expansion, channels (Tan and Le 2019, table 1)."""

    def __init__(self, num_classes=1000):
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2), nn.BatchNorm2d(32, eps=1e-3)
        blocks, inside = [], 32
        for count, size, stride, expansion, out in (
            *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
            *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
        ):
            for i in range(count):
                blocks.append(MobileBlock(inside, out, size, 1 if i else stride, expansion))
                inside = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = SameConv(320, 1280, 1), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, num_classes)

    def forward(self, x):
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


class Normalise(nn.Module):
    """A layer in front of the network, as Cohen's but for its constants, which are in the checkpoint."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("means", torch.tensor(mean))
        self.register_buffer("sds", torch.tensor(std))

    def forward(self, x):
        return (x - self.means[:, None, None]) / self.sds[:, None, None]


def scramble(network, seed=0):
    """Random weights and non-trivial batch-norm statistics, with activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda tensor, low, high: tensor.data.uniform_(low, high, generator=generator)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            last = name.endswith((".bn2", ".bn3"))  # of a residual branch: small, or a hundred of them explode
            uniform(module.weight, *((0.1, 0.4) if last else (0.5, 1.5)))
            uniform(module.bias, -0.5, 0.5)
            uniform(module.running_mean, -0.5, 0.5)
            uniform(module.running_var, 0.5, 2.0)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    return network.eval()
