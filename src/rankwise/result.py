"""The one result record: what a run, a grid's cell, a card and a report read and write."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rankwise.errors import ResultError
from rankwise.files import write_json
from rankwise.reading import as_json, read_json

SCHEMA = "rankwise-result/1"


@dataclass(frozen=True)
class Result:
    """One method on one task: what it was given, what it scored, what it cost.

    Attributes:
        name: what tables call it.
        method: `Method.describe()`.
        claim: what has to pay for the method to be worth it; "" for a baseline.
        task: `Task.describe()`.
        model: hub id, or the last part of a folder's name.
        rows: counts: "train", "held_out", "evaluated".
        split: which rows were evaluated: "validation" or "test".
        training: the TrainingArguments that decide a result.
        metrics: on the evaluated rows; "loss" in nats (squared error for a regression) among them.
        trainable_parameters: of what is handed over, task head included.
        lora_parameters: of the LoRA factors alone; None for a method without ranks.
        ranks: by plan entry; None for a method without ranks.
        cost: "search_seconds", "train_seconds", "peak_memory_bytes", "peak_memory_of", "steps".
        curve: `Curve.to_dict()` where sizes were compared, else None.
        figures: more that the choice rests on.
        about: of the machine and the call: "command", "threads", "resumed", "versions".
        resampled: the task's first metric on seeded resamples of the evaluated rows, the same rows
            for all results: their differences tell the interval of a difference.
        verdict: in words, what the comparison with the controls says; "" without any.
        controls: results of what was trained beside it.
    """

    name: str
    method: dict[str, Any]
    claim: str
    task: dict[str, Any]
    model: str
    rows: dict[str, int]
    split: str
    training: dict[str, Any]
    metrics: dict[str, float]
    trainable_parameters: int
    lora_parameters: int | None
    ranks: dict[str, int] | None
    cost: dict[str, Any]
    curve: dict[str, Any] | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    resampled: tuple[float, ...] = ()
    verdict: str = ""
    controls: tuple["Result", ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, its schema first."""
        plain = as_json(asdict(self) | {"controls": []})
        return {"schema": SCHEMA, **plain, "controls": [c.to_dict() for c in self.controls]}

    def save(self, path: str | Path) -> None:
        """Writes it as JSON, through a temporary name."""
        write_json(Path(path), self.to_dict())

    def with_controls(self, controls: list["Result"], verdict: str) -> "Result":
        """The same beside what it was compared with."""
        return replace(self, controls=tuple(controls), verdict=verdict)

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Reads and validates a record.

        Raises:
            ResultError: no such file, not JSON, of another schema, or with a field missing, unknown
                or of another type; the message names the file and the field.
        """
        raw = read_json(path, ResultError)
        try:
            return cls.from_dict(raw)
        except ResultError as error:
            raise ResultError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, raw: Any) -> "Result":
        """The inverse of `to_dict`. Raises ResultError, naming the field."""
        if not isinstance(raw, Mapping) or raw.get("schema") != SCHEMA:
            found = raw.get("schema") if isinstance(raw, Mapping) else type(raw).__name__
            raise ResultError(f'"schema" is {found!r}; a result has "schema": "{SCHEMA}"')
        values = {key: value for key, value in raw.items() if key != "schema"}
        known = {f.name for f in fields(cls)}
        if odd := sorted(set(values) ^ known):
            what = "an unknown field" if odd[0] in values else "no field"
            raise ResultError(f"it has {what} {odd[0]!r}; write it anew with this version")
        for name, kinds in _KINDS.items():
            value = values[name]
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ResultError(f"{name!r} is {value!r}, which is not of its type")
        for name, value in values["metrics"].items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ResultError(f"metric {name!r} is {value!r}; it has to be a finite number")
        for field_name in ("rows", "ranks"):
            for name, value in (values[field_name] or {}).items():
                if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                    raise ResultError(
                        f"{field_name}: {name!r} is {value!r}; it has to be an integer >= 0"
                    )
        for name in ("trainable_parameters", "lora_parameters"):
            if (values[name] or 0) < 0:
                raise ResultError(f"{name!r} is {values[name]}; it has to be at least 0")
        if not all(isinstance(x, int | float) for x in values["resampled"]):
            raise ResultError("'resampled' holds what is no number")
        values["resampled"] = tuple(values["resampled"])
        controls = tuple(cls.from_dict(control) for control in values.pop("controls"))
        return cls(**values, controls=controls)


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("name", "claim", "model", "split", "verdict"), str),
    **dict.fromkeys(("method", "task", "rows", "training", "metrics", "cost"), dict),
    **dict.fromkeys(("figures", "about"), dict),
    **dict.fromkeys(("ranks", "curve"), (dict, type(None))),
    "trainable_parameters": int,
    "lora_parameters": (int, type(None)),
    **dict.fromkeys(("controls", "resampled"), list),
}
