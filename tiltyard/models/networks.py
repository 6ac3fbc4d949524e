"""One torch module for each architecture of a ModelSpec; their tensors are those of `modelspec.tensor_shapes`.

Shape suffixes: B rows of the batch, C channels, H rows and W columns of an image, D features, K outputs.
"""

# ruff: noqa: N803, N806 -- the shape suffixes are capitals

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiltyard.models.encoder import EMBEDDING_DEVIATION, TransformerEncoder
from tiltyard.models.network import ACTIVATIONS, Network
from tiltyard.models.residual import ResidualNetwork
from tiltyard.modelspec import (
    KIND_OF,
    Activation,
    Convnet,
    Linear,
    Mlp,
    ModelSpec,
    Resnet,
    Transformer,
    image_shape,
    pooled_kernel,
)


class Perceptron(Network):
    """`linear` and `mlp`: the flattened row through zero or more hidden layers and the head."""

    def __init__(self, spec: ModelSpec, *, hidden: Sequence[int], activation: Activation, dropout: float) -> None:
        super().__init__(spec)
        self.hidden, width = _dense_layers(math.prod(spec.input_shape), hidden)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(width, spec.outputs, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of rows [B, ...]."""
        h_BD = self.scaled(x).flatten(1)
        for layer in self.hidden:
            h_BD = self.dropout(self.activation(layer(h_BD)))
        logits: Tensor = self.head(h_BD)
        return logits


class ConvolutionBlock(nn.Module):
    """Convolution at the same size, one-group GroupNorm, activation, and max pooling that halves, rounding up.

    GroupNorm over one group needs no running statistics, so a model is its trained numbers and nothing else, and a
    row's logits do not depend on its batch.
    """

    def __init__(self, inputs: int, outputs: int, *, kernel_size: int, activation: Activation) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, device="meta")
        self.norm = nn.GroupNorm(1, outputs, device="meta")
        self.activation = ACTIVATIONS[activation]()
        self.pool = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps of half the rows and columns."""
        maps: Tensor = self.pool(self.activation(self.norm(self.convolution(x_BCHW))))
        return maps


class ConvolutionalNetwork(Network):
    """`convnet`: blocks, average pooling to at most 4x4, hidden layers, head."""

    def __init__(self, spec: ModelSpec, architecture: Convnet) -> None:
        super().__init__(spec)
        inputs, rows, columns = image_shape(spec)
        blocks = []
        for outputs in architecture.channels:
            blocks.append(
                ConvolutionBlock(
                    inputs, outputs, kernel_size=architecture.kernel_size, activation=architecture.activation
                )
            )
            inputs, rows, columns = outputs, -(-rows // 2), -(-columns // 2)
        self.blocks = nn.ModuleList(blocks)
        # Not adaptive pooling: its backward pass on CUDA is not deterministic.
        kernel = (pooled_kernel(rows), pooled_kernel(columns))
        self.pool = nn.AvgPool2d(kernel, ceil_mode=True) if kernel != (1, 1) else nn.Identity()
        cells = -(-rows // kernel[0]) * -(-columns // kernel[1])
        self.hidden, width = _dense_layers(inputs * cells, architecture.hidden)
        self.activation = ACTIVATIONS[architecture.activation]()
        self.dropout = nn.Dropout(architecture.dropout) if architecture.dropout else nn.Identity()
        self.head = nn.Linear(width, spec.outputs, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] or [B, H, W]."""
        h_BCHW = self.images(x)
        for block in self.blocks:
            h_BCHW = block(h_BCHW)
        h_BD = self.dropout(self.pool(h_BCHW).flatten(1))
        for layer in self.hidden:
            h_BD = self.dropout(self.activation(layer(h_BD)))
        logits: Tensor = self.head(h_BD)
        return logits


# As many as float32 holds.
_DRAWN_BITS = 24


def build(spec: ModelSpec, *, seed: int | None) -> Network:
    """A module of `spec` on the CPU in float32, with fresh weights.

    The same spec and seed give the same bits on every machine; None draws a seed. torch's global random state is left
    alone. Raises ValueError for an ONNX graph, which is no module of ours.
    """
    module = build_empty(spec)
    # Not `to_empty`: it asks torch's symbolic shapes about each tensor, whose import takes a third of a second.
    module.load_state_dict({name: torch.empty(each.shape) for name, each in module.state_dict().items()}, assign=True)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            # torch's own default: uniform within 1/sqrt(fan-in), weight and bias alike.
            for parameter in part.parameters():
                _draw(parameter, 1 / math.sqrt(part.weight[0].numel()), generator)
        elif isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, nn.Embedding):
            _draw(part.weight, math.sqrt(3) * EMBEDDING_DEVIATION, generator)
    return module


def _draw(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fills a tensor uniformly within +-bound.

    Of torch's own uniform_ and normal_ the last bits depend on the processor's vector instructions. Here all is exact
    but the one product at the end, which IEEE 754 rounds alike everywhere.
    """
    drawn = torch.randint(0, 1 << _DRAWN_BITS, parameter.shape, generator=generator, dtype=torch.int32)
    with torch.no_grad():
        parameter.copy_(drawn).mul_(2.0 ** (1 - _DRAWN_BITS)).sub_(1.0).mul_(bound)


def build_empty(spec: ModelSpec) -> Network:
    """A module of `spec` whose tensors have shapes but no storage (torch's meta device), for weights to be put in."""
    match spec.architecture:
        case Linear():
            return Perceptron(spec, hidden=(), activation=Activation.RELU, dropout=0.0)
        case Mlp(hidden=hidden, activation=activation, dropout=dropout):
            return Perceptron(spec, hidden=hidden, activation=activation, dropout=dropout)
        case Convnet() as convnet:
            return ConvolutionalNetwork(spec, convnet)
        case Resnet() as resnet:
            return ResidualNetwork(spec, resnet)
        case Transformer() as transformer:
            return TransformerEncoder(spec, transformer)
        case other:
            raise ValueError(f"{KIND_OF[type(other)]} models have no torch module")


def _dense_layers(inputs: int, widths: Sequence[int]) -> tuple[nn.ModuleList, int]:
    """The hidden layers and the width that the last one gives."""
    layers = nn.ModuleList()
    for width in widths:
        layers.append(nn.Linear(inputs, width, device="meta"))
        inputs = width
    return layers, inputs
