"""Answers SQL with DuckDB, which shares nothing with this project; its tables are Parquet files.

Each line of standard input is a JSON object {"sql": "…"}, and each line of standard output the rows,
{"rows": [{"column": value, …}, …]}. What JSON has no form for is text, and bytes are hexadecimal.
The packages of parquet.txt must be on PYTHONPATH.
"""

import json
import sys

import duckdb

connection = duckdb.connect(config={"threads": 1})
connection.execute("SET TimeZone = 'UTC'")


def text(value):
    return value.hex() if isinstance(value, (bytes, bytearray)) else str(value)


for line in sys.stdin:
    found = connection.execute(json.loads(line)["sql"])
    columns = [column[0] for column in found.description]
    rows = [dict(zip(columns, row)) for row in found.fetchall()]
    print(json.dumps({"rows": rows}, default=text))
