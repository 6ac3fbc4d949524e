"""Our models in MLServer, as its users write a runtime: for the test with a real peer, and to be measured against.

Imported by MLServer's process alone, which has its own protobuf and our torch.
"""

import json
from pathlib import Path

import numpy as np
import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from tiltyard.models import load_model
from tiltyard.modelspec import from_json


class TiltyardModel(MLModel):
    """One `spec.json` with its `model.safetensors`, from the folder of the model's settings."""

    async def load(self) -> bool:
        """Read both files."""
        folder = Path(self.settings.parameters.uri)
        if not folder.is_absolute():
            folder = Path(self.settings._source).parent / folder
        self._network = load_model(
            from_json(json.loads((folder / "spec.json").read_text())), folder / "model.safetensors"
        )
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One batch."""
        rows = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        with torch.inference_mode():
            logits = self._network(torch.from_numpy(np.ascontiguousarray(rows))).numpy()
        return InferenceResponse(
            model_name=self.name, id=payload.id, outputs=[NumpyCodec.encode_output(name="logits", payload=logits)]
        )
