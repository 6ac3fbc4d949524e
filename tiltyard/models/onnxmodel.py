"""An ONNX graph as a network: rows in, logits out, computed by onnxruntime on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiltyard.modelspec import FaultCode, ModelFault, ModelSpec
from tiltyard.onnxfile import check_onnx


class GraphFailed(Exception):
    """The graph did not run on these rows, or gave something else than numbers; the text says what."""


class OnnxNetwork:
    """f(x) = graph(float32(x) * scale + offset), as a module of `tiltyard.models` is called."""

    def __init__(self, spec: ModelSpec, session: Any) -> None:
        self.spec = spec
        self._session = session
        self._input = session.get_inputs()[0].name

    @classmethod
    def load(cls, spec: ModelSpec, path: Path, *, max_bytes: int, max_parameters: int) -> tuple["OnnxNetwork", int]:
        """The network of a file, and how many parameters it has. Raises ModelFault, MemoryError and OSError.

        The structure is checked before onnxruntime sees the file. Raises ImportError where onnxruntime is missing.
        """
        size_bytes = path.stat().st_size
        with path.open("rb") as file:

            def read(offset: int, n: int) -> bytes:
                file.seek(offset)
                return file.read(n)

            structure = check_onnx(read, size_bytes, spec, max_bytes=max_bytes, max_parameters=max_parameters)
        # Imported here: it starts a thread, which the process that forks must not have, and few models need it.
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # One core: cores are better used for several batches, and threads would change the order of additions.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Products of 8-bit integers would saturate on x86 processors without VNNI, and be exact on all others.
        options.add_session_config_entry("session.x64quantprecision", "1")
        # From bytes: the runtime then knows no folder from which it could read anything else.
        try:
            session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except MemoryError:
            raise
        except Exception as error:  # the runtime has a class of its own for each way in which a graph can be wrong
            if "allocat" in str(error):
                raise MemoryError(str(error)) from error
            raise ModelFault(FaultCode.BAD_FORMAT, f"the graph does not load: {str(error)[:300]}") from error
        return cls(spec, session), structure.parameters

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits of rows [n, ...input_shape] of any real type, in the shape that the graph gives them, float32.

        Raises GraphFailed, and MemoryError.
        """
        x = rows.to(torch.float32)
        if self.spec.input_scale != 1.0:
            x = x * self.spec.input_scale
        if self.spec.input_offset != 0.0:
            x = x + self.spec.input_offset
        try:
            (answer,) = self._session.run(None, {self._input: x.numpy()})
        except MemoryError:
            raise
        except Exception as error:  # as above
            if "allocat" in str(error):
                raise MemoryError(str(error)) from error
            raise GraphFailed(f"the graph failed: {str(error)[:300]}") from error
        if not isinstance(answer, np.ndarray) or answer.dtype.kind != "f":
            raise GraphFailed("the graph's output is no tensor of floating-point numbers")
        return torch.from_numpy(np.ascontiguousarray(answer, dtype=np.float32))
