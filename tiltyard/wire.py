"""ModelSpec between its protobuf message and the dataclass of `tiltyard.modelspec`."""

from tiltyard import modelspec
from tiltyard.modelspec import Activation, ModelSpec
from tiltyard.type.v1 import model_pb2

DEFAULT_KERNEL_SIZE = 3

# ACTIVATION_UNSPECIFIED means RELU, as the message says.
_ACTIVATION_OF = {
    model_pb2.ACTIVATION_UNSPECIFIED: Activation.RELU,
    model_pb2.ACTIVATION_RELU: Activation.RELU,
    model_pb2.ACTIVATION_GELU: Activation.GELU,
    model_pb2.ACTIVATION_TANH: Activation.TANH,
    model_pb2.ACTIVATION_SILU: Activation.SILU,
}
_NUMBER_OF = {activation: number for number, activation in _ACTIVATION_OF.items() if number}


class WireError(ValueError):
    """A message that names no known model; `field` is the path of the bad field inside it."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


def model_spec_from_proto(message: model_pb2.ModelSpec) -> ModelSpec:
    """The spec that a message declares, its zero values replaced by what they mean; bounds are `modelspec.validate`'s.

    Raises WireError when no architecture is set or an activation is unknown.
    """
    return ModelSpec(
        input_shape=tuple(message.input_shape),
        outputs=message.outputs,
        architecture=_architecture(message),
        input_scale=message.input_scale or 1.0,
        input_offset=message.input_offset,
    )


def _architecture(message: model_pb2.ModelSpec) -> modelspec.Architecture:
    match message.WhichOneof("architecture"):
        case "linear":
            return modelspec.Linear()
        case "mlp":
            mlp = message.mlp
            return modelspec.Mlp(
                hidden=tuple(mlp.hidden),
                activation=_activation("mlp.activation", mlp.activation),
                dropout=mlp.dropout,
            )
        case "convnet":
            convnet = message.convnet
            return modelspec.Convnet(
                channels=tuple(convnet.channels),
                kernel_size=convnet.kernel_size or DEFAULT_KERNEL_SIZE,
                hidden=tuple(convnet.hidden),
                activation=_activation("convnet.activation", convnet.activation),
                dropout=convnet.dropout,
            )
        case "resnet":
            resnet = message.resnet
            return modelspec.Resnet(blocks=tuple(resnet.blocks), width=resnet.width, bottleneck=resnet.bottleneck)
        case "transformer":
            transformer = message.transformer
            return modelspec.Transformer(
                vocabulary=transformer.vocabulary,
                width=transformer.width,
                layers=transformer.layers,
                heads=transformer.heads,
                feed_forward=transformer.feed_forward,
                dropout=transformer.dropout,
            )
        case "onnx":
            return modelspec.Onnx(max_opset=message.onnx.max_opset)
        case _:
            raise WireError("architecture", "must be one of linear, mlp, convnet, resnet, transformer, onnx")


def _activation(field: str, number: model_pb2.Activation.ValueType) -> Activation:
    if number not in _ACTIVATION_OF:
        raise WireError(field, f"has the unknown value {number}")
    return _ACTIVATION_OF[number]


def model_spec_to_proto(spec: ModelSpec) -> model_pb2.ModelSpec:
    """The message that declares a spec; `model_spec_from_proto` gives back an equal one."""
    message = model_pb2.ModelSpec(
        input_shape=spec.input_shape,
        outputs=spec.outputs,
        input_scale=spec.input_scale,
        input_offset=spec.input_offset,
    )
    match spec.architecture:
        case modelspec.Linear():
            message.linear.SetInParent()
        case modelspec.Mlp() as mlp:
            message.mlp.CopyFrom(
                model_pb2.Mlp(hidden=mlp.hidden, activation=_NUMBER_OF[mlp.activation], dropout=mlp.dropout)
            )
        case modelspec.Convnet() as convnet:
            message.convnet.CopyFrom(
                model_pb2.Convnet(
                    channels=convnet.channels,
                    kernel_size=convnet.kernel_size,
                    hidden=convnet.hidden,
                    activation=_NUMBER_OF[convnet.activation],
                    dropout=convnet.dropout,
                )
            )
        case modelspec.Resnet() as resnet:
            message.resnet.CopyFrom(
                model_pb2.Resnet(blocks=resnet.blocks, width=resnet.width, bottleneck=resnet.bottleneck)
            )
        case modelspec.Transformer() as transformer:
            message.transformer.CopyFrom(
                model_pb2.Transformer(
                    vocabulary=transformer.vocabulary,
                    width=transformer.width,
                    layers=transformer.layers,
                    heads=transformer.heads,
                    feed_forward=transformer.feed_forward,
                    dropout=transformer.dropout,
                )
            )
        case modelspec.Onnx(max_opset=max_opset):
            message.onnx.CopyFrom(model_pb2.Onnx(max_opset=max_opset))
    return message
