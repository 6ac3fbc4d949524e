"""Residual networks. Shape suffixes: B rows of the batch, C channels, H rows and W columns of an image, K outputs."""

# ruff: noqa: N803, N806 -- the shape suffixes are capitals

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from tiltyard.models.network import Network
from tiltyard.modelspec import ConvolutionShape, ModelSpec, Resnet, image_shape, resnet_blocks, resnet_is_large


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + convolutions(x)), each convolution normalised, with ReLU between them."""

    def __init__(self, convolutions: Sequence[ConvolutionShape], shortcut: ConvolutionShape | None) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(_convolution(shape) for shape in convolutions)
        self.norms = nn.ModuleList(_norm(shape.outputs) for shape in convolutions)
        self.shortcut = None if shortcut is None else _convolution(shortcut)
        self.shortcut_norm = None if shortcut is None else _norm(shortcut.outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps of the same size, or of half of it and more channels."""
        h_BCHW = x_BCHW
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            h_BCHW = norm(convolution(functional.relu(h_BCHW) if index else h_BCHW))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x_BCHW = self.shortcut_norm(self.shortcut(x_BCHW))
        return functional.relu(x_BCHW + h_BCHW)


class ResidualNetwork(Network):
    """`resnet`: a first convolution, the stages of blocks, the average over the image, head."""

    def __init__(self, spec: ModelSpec, architecture: Resnet) -> None:
        super().__init__(spec)
        channels, width = image_shape(spec)[0], architecture.width
        large = resnet_is_large(spec)
        self.stem = _convolution(ConvolutionShape("stem", channels, width, 7 if large else 3, 2 if large else 1))
        self.stem_norm = _norm(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        blocks = iter(resnet_blocks(architecture))
        outputs = width
        stages = []
        for count in architecture.blocks:
            stage = nn.ModuleList()
            for _ in range(count):
                _, convolutions, shortcut = next(blocks)
                stage.append(ResidualBlock(convolutions, shortcut))
                outputs = convolutions[-1].outputs
            stages.append(stage)
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(outputs, spec.outputs, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] or [B, H, W]."""
        h_BCHW = self.pool(functional.relu(self.stem_norm(self.stem(self.images(x)))))
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)  # as it was made
            for block in stage:
                h_BCHW = block(h_BCHW)
        logits: Tensor = self.head(h_BCHW.mean((2, 3)))
        return logits


def _convolution(shape: ConvolutionShape) -> nn.Conv2d:
    """Without bias: the norm after it has one."""
    return nn.Conv2d(
        shape.inputs,
        shape.outputs,
        shape.kernel_size,
        stride=shape.stride,
        padding=shape.kernel_size // 2,
        bias=False,
        device="meta",
    )


def _norm(channels: int) -> nn.GroupNorm:
    """One group: no running statistics, and no row's logits depend on its batch."""
    return nn.GroupNorm(1, channels, device="meta")
