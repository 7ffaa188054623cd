"""`rankwise predict`: what a finished run's model says of rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.cli.arguments import AdapterArguments, flag, required
from rankwise.cli.flags import Group, parse
from rankwise.errors import OutputError


@dataclass
class PredictArguments:
    """Rows in, predictions out."""

    input_file: str | None = flag(None, "rows with the task's text columns: .jsonl, .csv, .parquet")
    output_file: str | None = flag(None, "a new file, one JSON object a row; without it, printed")
    batch_size: int = flag(32, "rows in a forward pass")
    max_new_tokens: int = flag(64, "of a completion, at most")
    model_name_or_path: str | None = flag(None, "the base model, if not the one the run had")
    gguf_file: str | None = flag(None, "name of a GGUF file in it")


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
    if rows.output_file is not None and Path(rows.output_file).exists():
        raise OutputError(f"{rows.output_file} exists; give a new --output_file")
    from rankwise.cli import quiet
    from rankwise.files import write_text
    from rankwise.predicting import predict

    quiet()
    found = predict(
        folder,
        source,
        batch_size=rows.batch_size,
        max_new_tokens=rows.max_new_tokens,
        model_name_or_path=rows.model_name_or_path,
        gguf_file=rows.gguf_file,
    )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    if rows.output_file is None:
        print(lines, end="")
    else:
        write_text(Path(rows.output_file), lines)
