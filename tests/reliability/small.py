"""The tiny model and the rows of the tests, for drives that pytest does not run."""

import importlib.util
from pathlib import Path

_FIXTURES = Path(__file__).parents[1] / "conftest.py"


class _Folders:
    """What pytest's `tmp_path_factory` is, of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def mktemp(self, name: str) -> Path:
        (self.folder / name).mkdir(parents=True)
        return self.folder / name


def model_and_rows(folder: Path) -> tuple[str, str, str]:
    """Folders of a random BERT, of few rows, and of more, made as the fixtures make them."""
    spec = importlib.util.spec_from_file_location("fixtures", _FIXTURES)
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    make = fixtures.tiny_bert.__wrapped__ if hasattr(fixtures.tiny_bert, "__wrapped__") else None
    make = make or fixtures.tiny_bert._get_wrapped_function()
    few, many = folder / "few", folder / "many"
    few.mkdir(parents=True)
    many.mkdir()
    fixtures.write_splits(few, train=36, validation=12, test=12)
    fixtures.write_splits(many, train=36, validation=80, test=12)
    return make(_Folders(folder)), str(few), str(many)
