"""What the processes that start often import beside torch: of more, each would take up to twice its time to start."""

import subprocess
import sys

MODELS = """
import sys
import services.modelserver.nursery
print([name for name in ("pydantic", "jwt", "sqlalchemy", "services.runtime.server") if name in sys.modules])
"""
TRAINING = """
import numpy as np
from services.trainer.config import LossKind, OptimizerKind, TrainingConfig
from services.trainer.descent.descent import Descent
from services.trainer.descent.rows import Rows
from tiltyard.modelspec import Linear, ModelSpec

rows = Rows(np.ones((8, 2), np.float32), np.arange(8) % 2, loss=LossKind.CROSS_ENTROPY, outputs=2, device="cpu")
for optimizer in OptimizerKind:
    config = TrainingConfig(epochs=1, batch_size=2, max_gradient_norm=1.0, optimizer=optimizer)
    first, second = (
        Descent(spec=ModelSpec((2,), 2, Linear()), loss=LossKind.CROSS_ENTROPY, config=config, rows=rows)
        for _ in range(2)
    )
    first.run(report=lambda _: first.stop(), clock=iter(range(1000)).__next__)
    second.restore(first.state())
    assert second.run(report=lambda _: None)
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


def test_neither_a_model_server_nor_a_training_carries_what_it_never_uses() -> None:
    told = subprocess.run([sys.executable, "-c", MODELS + TRAINING], stdout=subprocess.PIPE, text=True, check=True)
    assert told.stdout == "[]\n[]\n"
