"""Inference messages taken apart and put together by hand: the same bytes that protobuf reads and writes."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from services.modelserver.wireformat import encode_response, encode_stream_response, parse_request
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.varint import encode_varint


def request(raw: list[bytes]) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="m", id="7", raw_input_contents=raw)
    message.inputs.add(name="x", datatype="UINT8", shape=(2, 300)).parameters["p"].double_param = 0.5
    message.parameters["priority"].int64_param = -1
    return message


@given(st.lists(st.binary(max_size=400), max_size=3))
def test_a_request_is_read_as_protobuf_reads_it(raw: list[bytes]) -> None:
    message = request(raw)
    found = parse_request(message.SerializeToString())
    assert [bytes(view) for view in found.raw] == raw
    del message.raw_input_contents[:]
    assert found.message == message


def test_fields_may_come_in_any_order_and_unknown_ones_are_passed_over() -> None:
    tensor = pb.ModelInferRequest(raw_input_contents=[b"abc"]).SerializeToString()
    head = pb.ModelInferRequest(model_name="m").SerializeToString()
    # Fields 1000 and 1001 as 64 and 32 bits.
    unknown = encode_varint(1000 << 3 | 1) + bytes(8) + encode_varint(1001 << 3 | 5) + bytes(4)
    found = parse_request(tensor + unknown + head + tensor)
    assert found.message.model_name == "m"
    assert [bytes(view) for view in found.raw] == [b"abc", b"abc"]


@given(st.binary(max_size=60))
def test_what_is_no_message_is_an_error_and_nothing_else(received: bytes) -> None:
    try:
        expected = pb.ModelInferRequest.FromString(received)
    except DecodeError:
        with pytest.raises(DecodeError):
            parse_request(received)
        return
    try:
        found = parse_request(received)
    except DecodeError:
        return  # groups, which protobuf skips and no client sends
    assert [bytes(view) for view in found.raw] == list(expected.raw_input_contents)


@pytest.mark.parametrize("cut", [1, 5, 200])
def test_a_request_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(DecodeError):
        parse_request(request([bytes(300)]).SerializeToString()[:-cut])


@given(st.binary(max_size=400))
def test_answers_are_written_as_protobuf_writes_them(tensor: bytes) -> None:
    head = pb.ModelInferResponse(model_name="m", id="7")
    head.outputs.add(name="logits", datatype="FP32", shape=(3, 2))
    whole = pb.ModelInferResponse()
    whole.CopyFrom(head)
    whole.raw_output_contents.append(tensor)
    assert pb.ModelInferResponse.FromString(encode_response(head, tensor)) == whole
    streamed = pb.ModelStreamInferResponse.FromString(encode_stream_response(head, tensor))
    assert streamed == pb.ModelStreamInferResponse(infer_response=whole)
