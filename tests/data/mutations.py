"""Random damage to the files of `meta/`, for fuzzing. Each function changes a file in place."""

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

JUNK: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        "x",
        "../x",
        "/etc/x",
        "\0",
        "9" * 50,
        "int64",
        "float32",
        "video",
        "image",
        "string",
    ),
    *("v2.0", "v3.1", "{chunk_index}", "{0}", "{x.y}", "{", "{chunk_index!r}{file_index}"),
    *("data/{chunk_index:999999999d}/{file_index}", "data/{episode_chunk}/../../{episode_index}"),
    *(-1, 0, 1, 2, 1.5, -0.5, 1e308, 1e-308, 2**53, 2**63, 10**30, -(10**30), math.nan, math.inf, -math.inf),
    *([], {}, [1], [-1], [[1]], ["a"], [None], {"a": 1}, {"a": {"b": 1}}, [[[[]]]]),
]
TYPES = [pa.string(), pa.int8(), pa.uint64(), pa.float32(), pa.bool_(), pa.binary(), pa.timestamp("s")]


def mutate(rng: random.Random, path: Path) -> str:
    """Damage a file of `meta/`; give a description."""
    if rng.random() < 0.2:
        return _mutate_bytes(rng, path)
    kinds = {".json": _mutate_json, ".jsonl": _mutate_lines, ".parquet": _mutate_table}
    return kinds[path.suffix](rng, path)


def _mutate_bytes(rng: random.Random, path: Path) -> str:
    data = path.read_bytes()
    i = rng.randrange(len(data))
    new = rng.choice([b"", data[i:][1:], b"\0\0\0\0" + data[i + 4 :], bytes([data[i] ^ 16]) + data[i + 1 :]])
    path.write_bytes(data[:i] + new)
    return f"{len(data) - i} bytes from byte {i} became {len(new)}"


def _mutate_json(rng: random.Random, path: Path) -> str:
    tree, what = _mutate_tree(rng, json.loads(path.read_text()))
    path.write_text(json.dumps(tree))
    return what


def _mutate_lines(rng: random.Random, path: Path) -> str:
    lines = path.read_text().splitlines()
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    what = rng.choice([*["tree"] * 4, "leave out", "repeat", "exchange", "empty", "junk", "join"])
    if what == "tree":
        tree, what = _mutate_tree(rng, json.loads(lines[i]))
        lines[i] = json.dumps(tree)
    elif what == "leave out":
        del lines[i]
    elif what == "repeat":
        lines.insert(j, lines[i])
    elif what == "exchange":
        lines[i], lines[j] = lines[j], lines[i]
    elif what == "join":
        lines[i:] = ["".join(lines[i:])]
    else:
        lines.insert(i, json.dumps(rng.choice(JUNK)) if what == "junk" else " ")
    path.write_text("\n".join(lines) + "\n")
    return f"line {i}: {what}"


def _mutate_tree(rng: random.Random, tree: Any) -> tuple[Any, str]:
    tree = {"": copy.deepcopy(tree)}
    places = [place for place in _places(tree) if place]
    *upper, key = place = rng.choice(places)
    parent = _at(tree, upper)
    old = parent[key]
    what = rng.choice(["junk", "junk", "leave out", "tweak", "tweak", "rename", "repeat", "wrap", "copy"])
    if what == "leave out" and upper:
        del parent[key]
    elif what == "rename" and upper and isinstance(parent, dict):
        parent[rng.choice([f"{key}x", "", "a/b", "..", "index", "action", "\0"])] = parent.pop(key)
    elif what == "repeat" and isinstance(parent, list):
        parent.insert(int(key), copy.deepcopy(old))
    elif what == "copy":
        parent[key] = copy.deepcopy(_at(tree, rng.choice(places)))
    elif what == "tweak":
        parent[key] = _tweak(rng, old)
    else:
        parent[key] = [old] if what == "wrap" else copy.deepcopy(rng.choice(JUNK))
    return tree[""], f"{what} at {place[1:]}"


def _places(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*here, key))


def _at(tree: Any, place: Any) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _tweak(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, value - 1, -value, value * 2, value + 0.5, str(value), value * 1e6])
    if isinstance(value, str):
        i = rng.randrange(len(value) + 1)
        return rng.choice([value[:i] + value[i + 1 :], value[:i] + rng.choice("/{}.:0 \0") + value[i:]])
    if isinstance(value, list):
        return rng.choice([value[:-1], value + value, value[::-1], [*value, rng.choice(JUNK)]])
    return 1


def _mutate_table(rng: random.Random, path: Path) -> str:
    table = pq.read_table(path)
    key = rng.choice([name for name in table.column_names if not name.startswith("stats/")])
    i, row = table.column_names.index(key), rng.randrange(len(table))
    cells = table[key].to_pylist()
    what = rng.choice([*["cell"] * 5, "null", "exchange", "type", "drop", "rename", "rows", "list", "schema"])
    if what in ("cell", "null", "exchange"):
        other = rng.randrange(len(cells))
        old = cells[row]
        cells[row] = {"cell": _tweak(rng, old), "null": None, "exchange": cells[other]}[what]
        cells[other] = old if what == "exchange" else cells[other]
        table = table.set_column(i, key, _as_column(cells, table[key].type))
    elif what == "type":
        table = table.set_column(i, key, _as_column(cells, rng.choice(TYPES)))
    elif what == "drop":
        table = table.drop_columns([key])
    elif what == "rename":
        table = table.rename_columns([f"{name}x" if name == key else name for name in table.column_names])
    elif what == "rows":
        rows = rng.choices(range(len(table)), k=rng.randrange(2 * len(table)))
        table = table.take(pa.array(rows, pa.int64()))
    elif what == "list":
        table = table.set_column(i, key, pa.array([[cell] for cell in cells]))
    else:
        table = pa.table({"x": [1, 2]})
    pq.write_table(table, path)
    return f"{what} of '{key}', row {row}"


def _as_column(cells: list[Any], kind: pa.DataType) -> pa.Array:
    """Make a column of this type, or of texts if that cannot be."""
    try:
        return pa.array(cells, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([str(cell) for cell in cells])
