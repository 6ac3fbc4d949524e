"""The Open Inference Protocol's messages to batches and logits, and back."""

from collections.abc import Sequence

import numpy as np

from services.modelserver.models import VERSION, IndexEntry
from services.modelserver.running import Batch, Logits
from services.runtime.errors import ArenaError, InvalidArgument
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.modelspec import ModelSpec

INPUT = "x"
OUTPUT = "logits"

# Where the protocol puts the elements of each data type, and numpy's name of the type. FP16 has no such place.
_CONTENTS = {
    "BOOL": ("bool_contents", "<?"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
}


def batch_of(request: pb.ModelInferRequest, raw: Sequence[bytes | memoryview]) -> Batch:
    """The one input of a request, `raw` being its `raw_input_contents`. Raises InvalidArgument naming the field."""
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
        raise InvalidArgument.field("inputs", f"must be exactly one tensor named {INPUT!r}")
    if any(output.name != OUTPUT for output in request.outputs):
        raise InvalidArgument.field("outputs", f"the only output is {OUTPUT!r}")
    tensor = request.inputs[0]
    if raw and tensor.HasField("contents"):
        raise InvalidArgument.field("inputs[0].contents", "must be left out when raw_input_contents is given")
    if len(raw) > 1:
        raise InvalidArgument.field("raw_input_contents", "must have one entry for the one input")
    return Batch(datatype=tensor.datatype, shape=tuple(tensor.shape), data=raw[0] if raw else _typed_contents(tensor))


def _typed_contents(tensor: pb.ModelInferRequest.InferInputTensor) -> bytes:
    if tensor.datatype not in _CONTENTS:
        raise InvalidArgument.field(
            "inputs[0].datatype", f"{tensor.datatype or 'an empty type'} has no typed contents; send raw_input_contents"
        )
    place, dtype = _CONTENTS[tensor.datatype]
    values = np.asarray(getattr(tensor.contents, place))
    if values.size and values.dtype.kind in "iu" and dtype[1] in "iu":
        bounds = np.iinfo(dtype)
        if values.min() < bounds.min or values.max() > bounds.max:
            raise InvalidArgument.field(f"inputs[0].contents.{place}", f"has a value that is no {tensor.datatype}")
    return values.astype(dtype).tobytes()


def response_head(request: pb.ModelInferRequest, logits: Logits) -> pb.ModelInferResponse:
    """The answer to one request, but for the logits themselves."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
    response.outputs.add(name=OUTPUT, datatype="FP32", shape=logits.shape)
    return response


def infer_response(request: pb.ModelInferRequest, logits: Logits) -> pb.ModelInferResponse:
    """The answer to one request."""
    response = response_head(request, logits)
    response.raw_output_contents.append(bytes(logits.data))
    return response


def stream_error(request: pb.ModelInferRequest, error: ArenaError) -> pb.ModelStreamInferResponse:
    """The answer to one wrong request of a stream: what is wrong, and which request it was."""
    return pb.ModelStreamInferResponse(
        error_message=str(error),
        infer_response=pb.ModelInferResponse(
            model_name=request.model_name, model_version=request.model_version, id=request.id
        ),
    )


def model_metadata(name: str, spec: ModelSpec) -> pb.ModelMetadataResponse:
    """A model's tensors in the protocol's words."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=name,
        versions=[VERSION],
        platform="pytorch_safetensors",
        inputs=[tensor(name=INPUT, datatype="FP32", shape=(-1, *spec.input_shape))],
        outputs=[tensor(name=OUTPUT, datatype="FP32", shape=(-1, spec.outputs))],
    )


def repository_index(entries: list[IndexEntry]) -> pb.RepositoryIndexResponse:
    """The repository's models in the protocol's words."""
    return pb.RepositoryIndexResponse(
        models=[
            pb.RepositoryIndexResponse.ModelIndex(
                name=entry.name,
                version=VERSION,
                state="READY" if entry.ready else "UNAVAILABLE",
                reason=entry.reason,
            )
            for entry in entries
        ]
    )
