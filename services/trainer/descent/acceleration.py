"""What makes a step faster on a device that can: bfloat16, channels-last images, compilation, TF32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.trainer.config import Precision, TrainingConfig
from tiltyard.modelspec import Convnet, ModelSpec, Resnet

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")


@dataclass(frozen=True)
class Acceleration:
    """How a network is run while it is trained. Its weights stay float32, and it is always evaluated in float32."""

    device_type: str = "cpu"
    bfloat16: bool = False
    channels_last: bool = False
    compiler: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None = None
    """Applied to the module before the first step; torch.compile, or None to run it as it is."""

    @classmethod
    def of(cls, config: TrainingConfig, spec: ModelSpec, device: torch.device) -> "Acceleration":
        """What a configuration asks for; images lie channels-last where convolutions are faster so, on CUDA."""
        return cls(
            device_type=device.type,
            bfloat16=config.precision is Precision.BFLOAT16,
            channels_last=device.type == "cuda" and isinstance(spec.architecture, Convnet | Resnet),
            compiler=torch.compile if config.compile else None,
        )

    def forward(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The module as a function of a batch, float32 logits; the module's memory format is set."""
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        run: Callable[[Tensor], Tensor] = module if self.compiler is None else self.compiler(module)
        if not self.bfloat16:
            return run
        device_type = self.device_type

        def in_bfloat16(x: Tensor) -> Tensor:
            with torch.autocast(device_type, dtype=torch.bfloat16):
                logits = run(x)
            return logits.to(torch.float32)

        return in_bfloat16


def allow_tf32(allowed: bool) -> None:
    """For the whole process: whether CUDA may compute float32 products and convolutions in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, torch's allocators' or the kernel's."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)
