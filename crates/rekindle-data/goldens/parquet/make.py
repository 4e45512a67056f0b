"""Writes the Parquet files beside this script, as `datasets` does (pyarrow, one type a column, nulls where a row has
nothing), and what `to_pylist` gives of them, without nulls in structs, as JSON.

    python -m venv venv && venv/bin/pip install pyarrow==26.0.1 && venv/bin/python make.py
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent

CHAT = [
    {
        "id": 7,
        "tools": '[{"name": "clock"}]',
        "messages": [
            {"role": "user", "content": "What time is it?", "thinking": None, "tool_calls": None},
            {
                "role": "assistant",
                "content": None,
                "thinking": "Look.",
                "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}],
            },
            {"role": "tool", "content": "12:00", "thinking": None, "tool_calls": None},
            {"role": "assistant", "content": "Noon. 🕛", "thinking": None, "tool_calls": []},
        ],
        "score": 0.5,
    },
    {
        "id": None,
        "tools": None,
        "messages": [
            {"role": "user", "content": "grüße", "thinking": None, "tool_calls": None},
            {"role": "assistant", "content": "hello", "thinking": "", "tool_calls": None},
        ],
        "score": None,
    },
]
IDS = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": None}] * 40
TEXT = [{"prompt": f"question {i}", "completion": f"answer {i}", "blob": b"\xff\x00" * 8} for i in range(5)]


def without_nulls(value):
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def write(name, rows, **options):
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, HERE / f"{name}.parquet", **options)
    return [
        {k: without_nulls(v) for k, v in row.items() if k not in ("id", "score", "blob")} for row in table.to_pylist()
    ]


if __name__ == "__main__":
    expected = {"chat": write("chat", CHAT), "ids": write("ids", IDS, row_group_size=30, compression="zstd")}
    for compression in ["none", "gzip", "brotli", "lz4"]:
        # Dictionaries, and pages of both versions.
        version = "2.0" if compression in ("none", "brotli") else "1.0"
        expected[compression] = write(
            compression, TEXT, compression=compression, data_page_version=version, use_dictionary=compression != "gzip"
        )
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in expected.items())
    (HERE / "expect.json").write_text("{\n" + lines + "\n}\n")
