"""Writes events.bin with TensorBoard's own records and protocol buffers. Made with tensorboard 2.21.0, protobuf 7.36.2."""

import pathlib

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

Value = summary_pb2.Summary.Value


def scalars(**values):
    return summary_pb2.Summary(value=[Value(tag=tag.replace("__", "/"), simple_value=v) for tag, v in values.items()])


def text(tag, text):
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()], tensor_shape=shape)
    plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
    metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
    return summary_pb2.Summary(value=[Value(tag=tag, metadata=metadata, tensor=tensor)])


EVENTS = [
    dict(file_version="brain.Event:2"),
    dict(step=1, summary=scalars(train__loss=2.5, train__learning_rate=2e-4, train__grad_norm=0.0)),
    dict(step=300, summary=scalars(eval__loss=float("nan"))),
    dict(step=300, summary=text("samples/1", "größer **fett**")),
    dict(step=301, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)),
]

with open(pathlib.Path(__file__).parent / "events.bin", "wb") as file:
    writer = RecordWriter(file)
    for i, fields in enumerate(EVENTS):
        writer.write(event_pb2.Event(wall_time=1_700_000_000.25 + i, **fields).SerializeToString())
    writer.flush()
