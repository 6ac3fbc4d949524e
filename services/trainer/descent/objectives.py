"""What a descent minimises, L = (1/N) * sum l(f(x_i), y_i), and the optimiser that turns its gradient into steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from services.trainer.config import LossKind, OptimizerKind, TrainingConfig
from services.trainer.descent.optimizers import SGD, AdamW


def objective(
    loss: LossKind, label_smoothing: float, *, class_weights: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean of l over a batch; a class's weight multiplies the l of its rows."""
    match loss:
        case LossKind.CROSS_ENTROPY if class_weights is not None:
            # torch's mean would divide by the weights of the batch, which differ from batch to batch.
            summed = nn.CrossEntropyLoss(class_weights, label_smoothing=label_smoothing, reduction="sum")
            return lambda answers, labels: summed(answers, labels) / len(labels)
        case LossKind.CROSS_ENTROPY:
            return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        case LossKind.MSE:
            return nn.MSELoss()
        case LossKind.BINARY_CROSS_ENTROPY:
            return nn.BCEWithLogitsLoss()
        case LossKind.HUBER:
            return nn.HuberLoss(delta=1.0)


def optimizer_of(config: TrainingConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The configured optimiser of a module's parameters, as one fused kernel."""
    match config.optimizer:
        case OptimizerKind.ADAMW:
            return AdamW(module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        case OptimizerKind.SGD:
            return SGD(
                module.parameters(),
                lr=config.learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                fused=True,
            )


def kept_of_each(config: TrainingConfig) -> dict[str, Tensor]:
    """What the optimiser keeps of a parameter of one dimension after a step, by name: scalars, and tensors like it."""
    module = nn.ParameterList([torch.zeros(2)])
    module[0].grad = torch.zeros(2)
    optimizer = optimizer_of(config, module)
    optimizer.step()
    return {name: tensor for name, tensor in optimizer.state[module[0]].items() if tensor is not None}
