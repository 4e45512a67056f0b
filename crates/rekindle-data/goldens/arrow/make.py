"""Writes the Arrow files and folders beside this script, as pyarrow, pandas' `to_feather` and `datasets` do, and what
`to_pylist` gives of them, without nulls in structs, as JSON.

    python -m venv venv && venv/bin/pip install pyarrow==26.0.1 datasets==5.2.0 && venv/bin/python make.py
"""

import datetime
import decimal
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parquet"))
from make import CHAT, IDS, TEXT, without_nulls  # noqa: E402


def rows_of(table):
    return [
        {k: without_nulls(v) for k, v in row.items() if k not in ("id", "score", "blob")} for row in table.to_pylist()
    ]


def stream(name, table, **options):
    with pa.OSFile(str(HERE / name), "wb") as out, pa.ipc.new_stream(
        out, table.schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as writer:
        writer.write_table(table, max_chunksize=30)
    return rows_of(table)


def file(name, table, **options):
    with pa.OSFile(str(HERE / name), "wb") as out, pa.ipc.new_file(
        out, table.schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as writer:
        writer.write_table(table, max_chunksize=2)
    return rows_of(table)


def types():
    """One column, `messages`, of structs with every type that is read."""
    day = datetime.date(2024, 5, 17)
    time = datetime.datetime(2024, 5, 17, 12, 30)
    values = {
        "null": pa.array([None], pa.null()),
        "bool": pa.array([True]),
        "int8": pa.array([-8], pa.int8()),
        "uint64": pa.array([2**64 - 1], pa.uint64()),
        "half": pa.array([0.5], pa.float16()),
        "float": pa.array([1.25], pa.float32()),
        "double": pa.array([0.1]),
        "string": pa.array(["grüße"]),
        "large_string": pa.array(["large"], pa.large_string()),
        "view": pa.array(["a text longer than twelve bytes"], pa.string_view()),
        "binary": pa.array([b"text"]),
        "fixed": pa.array([b"abc"], pa.binary(3)),
        "list": pa.array([[1, None, 3]]),
        "large_list": pa.array([["x"]], pa.large_list(pa.string())),
        "fixed_list": pa.array([[1, 2]], pa.list_(pa.int32(), 2)),
        "map": pa.array([[("k", 1), ("l", None)]], pa.map_(pa.string(), pa.int32())),
        "dictionary": pa.array(["again"]).dictionary_encode(),
        "date": pa.array([day]),
        "time": pa.array([time], pa.timestamp("us")),
        "decimal": pa.array([decimal.Decimal("1.50")]),
        "json": pa.array(['{"any": [1, "b"]}'], pa.json_()),
    }
    struct = pa.StructArray.from_arrays(
        list(values.values()), fields=[pa.field(name, array.type) for name, array in values.items()]
    )
    table = pa.table({"messages": pa.ListArray.from_arrays([0, 1], struct)})
    expected = rows_of(table)
    turn = expected[0]["messages"][0]
    # As JSON writes them.
    turn |= {"binary": "text", "fixed": "abc", "map": {"k": 1, "l": None}, "json": {"any": [1, "b"]}}
    turn |= {"date": "2024-05-17", "time": "2024-05-17 12:30:00", "decimal": "1.50"}
    return table, expected


def folders():
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{k: v for k, v in row.items() if k != "blob"} for row in TEXT])
    for name in ["saved", "saved_dict"]:
        shutil.rmtree(HERE / name, ignore_errors=True)
    rows.save_to_disk(HERE / "saved", num_shards=2)
    datasets.DatasetDict(train=rows.select([0, 1, 2]), test=rows.select([3, 4])).save_to_disk(HERE / "saved_dict")


if __name__ == "__main__":
    chat, ids, text = (pa.Table.from_pylist(rows) for rows in (CHAT, IDS, TEXT))
    coded = text.set_column(0, "prompt", text["prompt"].combine_chunks().dictionary_encode())
    table, of_types = types()
    expected = {
        "chat_stream.arrow": stream("chat_stream.arrow", chat),
        "chat_file.arrow": file("chat_file.arrow", chat),
        "ids_zstd.arrow": stream("ids_zstd.arrow", ids, compression="zstd"),
        "dictionary.arrow": file("dictionary.arrow", coded),
        "types.arrow": stream("types.arrow", table) and of_types,
    }
    feather.write_feather(text, HERE / "text.feather", compression="lz4")
    expected["text.feather"] = rows_of(text)
    folders()
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in expected.items())
    (HERE / "expect.json").write_text("{\n" + lines + "\n}\n")
