"""The tables of CONTRIBUTING.md, by which a newcomer finds a module, against the code."""

import ast
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY


def rows(table):
    """Returns the modules of a table by the row they are in."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text().split(f"| {table} | what it holds |")[1].split("\n\n")[0]
    lines = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name: row for row, line in enumerate(lines) for name in re.findall(r"`(\w+)\.py`", line)}


def imported(path: Path):
    """Yields the names of the modules that a file imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("table", "package"), [("core", "vmcr2"), ("lab", "vmcr2.lab")])
def test_imports_go_downward_in_the_tables_which_name_every_module(table, package):
    row, folder = rows(table), REPOSITORY / "src" / Path(*package.split("."))
    assert set(row) == {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    for name in row:
        for module in imported(folder / f"{name}.py"):
            below = row.get(module.removeprefix(f"{package}."), len(row))
            assert below >= row[name], f"{name} imports {module}"
            assert package != "vmcr2" or not module.startswith("vmcr2.lab"), f"{name} imports {module}"
