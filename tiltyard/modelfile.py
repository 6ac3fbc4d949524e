"""Whether a submitted file is one of its task's model, whatever the format."""

from tiltyard.modelspec import ModelSpec, Onnx, check_safetensors
from tiltyard.onnxfile import check_onnx
from tiltyard.tensorfile import Read


def check_model_file(read: Read, total_bytes: int, spec: ModelSpec, *, max_bytes: int, max_parameters: int) -> None:
    """Check a file of `total_bytes` bytes against `spec`: an ONNX file for `onnx`, safetensors for all else.

    Neither weights nor graphs are run. Raises ModelFault (TOO_LARGE, BAD_FORMAT, SHAPE_MISMATCH).
    """
    if isinstance(spec.architecture, Onnx):
        check_onnx(read, total_bytes, spec, max_bytes=max_bytes, max_parameters=max_parameters)
    else:
        check_safetensors(read, total_bytes, spec, max_bytes=max_bytes)
