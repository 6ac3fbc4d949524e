"""What every network is: a module of a ModelSpec that takes rows of any dtype and scales them itself.

Shape suffixes: B rows of the batch, C channels, H rows and W columns of an image, K outputs.
"""

import torch
from torch import Tensor, nn

from tiltyard.modelspec import Activation, ModelSpec, image_shape

ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    Activation.RELU: nn.ReLU,
    Activation.GELU: nn.GELU,
    Activation.TANH: nn.Tanh,
    Activation.SILU: nn.SiLU,
}


class Network(nn.Module):
    """f(x) = network(float32(x) * scale + offset), logits of shape [B, K], for x of any real dtype."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec

    def images(self, x: Tensor) -> Tensor:
        """The scaled input as images [B, C, H, W]."""
        return self.scaled(x).reshape(x.shape[0], *image_shape(self.spec))

    def scaled(self, x: Tensor) -> Tensor:
        """The input as float32, scaled and shifted; x itself is never changed."""
        scale, offset = self.spec.input_scale, self.spec.input_offset
        if x.dtype != torch.float32:
            # The conversion made a copy of our own, so the rest may happen in place.
            x = x.to(torch.float32)
            if scale != 1.0:
                x.mul_(scale)
            if offset != 0.0:
                x.add_(offset)
            return x
        if scale != 1.0:
            x = x * scale
        return x + offset if offset != 0.0 else x
