"""SIGKILL at seeded moments, resumed, and compared bit for bit with the undisturbed run."""

import random

import pytest
from kills import COMMANDS, Kill, killed_and_resumed, reference

QUICK = {"run": 1, "run-cut": 1, "train": 1, "cut": 2}  # kills at file operations


@pytest.fixture(scope="module")
def references(forks, tiny_bert, rows_dir, many_rows_dir, tmp_path_factory):
    """One undisturbed run of each command, made when it is first asked for."""
    found = {}

    def of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            found[name] = reference(forks, name, folder, tiny_bert, rows_dir, many_rows_dir, of)
        return found[name]

    return of


@pytest.mark.parametrize("name", QUICK)
def test_a_killed_run_that_goes_on_ends_as_if_nothing_had_been(forks, references, name, tmp_path):
    rng = random.Random(name)
    whole = references(name)
    moments = [Kill(at=rng.randint(1, whole.operations)) for _ in range(QUICK[name])]
    if name == "train":
        moments += [Kill(after=rng.uniform(0, whole.seconds))]
    for number, moment in enumerate(moments):
        folder = tmp_path / str(number)
        assert killed_and_resumed(forks, whole, moment, folder) == "", moment


def test_every_command_is_in_the_drive():
    from rankwise.cli import COMMANDS as ALL
    from rankwise.methods import METHODS

    # Grids have kills of their own: tests/compare, and the soak.
    assert {command.argv[0] for command in COMMANDS.values()} == set(ALL) - {"compare"}
    used = {word for command in COMMANDS.values() for word in command.argv}
    assert set(METHODS) - used <= {"lora", "llama-adapter"}
