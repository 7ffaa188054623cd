"""`rankwise predict`: what a finished run's model says of rows."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.cli.arguments import AdapterArguments, flag, required
from rankwise.cli.flags import Group, parse
from rankwise.errors import OutputError


@dataclass
class PredictArguments:
    """Rows in, predictions out."""

    input_file: str | None = flag(None, "rows with the task's text columns: .jsonl, .csv, .parquet")
    output_file: str | None = flag(
        None, "a new .jsonl or .csv file; without it, JSON lines are printed"
    )
    batch_size: int = flag(32, "rows in a forward pass")
    max_new_tokens: int = flag(64, "of a completion, at most")
    model_name_or_path: str | None = flag(None, "the base model, if not the one the run had")
    gguf_file: str | None = flag(None, "name of a GGUF file in it")
    load_in_4bit: bool | None = flag(
        None, "whether the base's weights are kept in 4 bits, if not as the run had them"
    )


def main(argv: Sequence[str]) -> None:
    """Write what the model of a finished run says of each row, in the rows' order."""
    which, rows = parse(
        "predict",
        main.__doc__ or "",
        [Group("adapter", AdapterArguments()), Group("rows", PredictArguments())],
        argv,
    )
    folder = required(which.adapter, "adapter", "predict")
    source = required(rows.input_file, "input_file", "predict")
    target = None if rows.output_file is None else Path(rows.output_file)
    if target is not None and target.suffix not in (".jsonl", ".csv"):
        raise OutputError(f"--output_file is {target.name!r}; it has to end in .jsonl or .csv")
    from rankwise.cli import quiet
    from rankwise.files import check_new, write_text

    if target is not None:
        check_new(target, "--output_file")
    from rankwise.predicting import predict

    quiet()
    found = predict(
        folder,
        source,
        batch_size=rows.batch_size,
        max_new_tokens=rows.max_new_tokens,
        model_name_or_path=rows.model_name_or_path,
        gguf_file=rows.gguf_file,
        load_in_4bit=rows.load_in_4bit,
    )
    if target is None:
        print(_json_lines(found), end="")
    else:
        write_text(target, (_csv if target.suffix == ".csv" else _json_lines)(found))


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """A header and a line a row; a list, such as tags by word, with spaces between."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    table.writeheader()
    for row in rows:
        table.writerow(
            {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        )
    return text.getvalue()
