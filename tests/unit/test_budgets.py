"""The budgets of the house: short modules and functions, a fast import, few public names, print in the CLI only."""

import ast
import json
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import gemscope

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "gemscope"
MODULES = sorted(SRC.rglob("*.py"))


def test_no_module_is_above_600_lines_and_the_median_is_about_200():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert max(lengths.values()) <= 600, max(lengths, key=lambda p: lengths[p])
    assert statistics.median(lengths[p] for p in MODULES if p.name != "__init__.py") <= 220


def test_no_function_is_above_60_lines():
    long = [
        f"{path.relative_to(SRC)}:{node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 60
    ]
    assert long == []


def test_importing_the_package_is_fast_and_does_not_import_torch():
    code = (
        "import json, sys, time; t = time.process_time(); import gemscope; s = time.process_time() - t;"
        "print(json.dumps([s, 'torch' in sys.modules, 'transformers' in sys.modules]))"
    )
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(3)]
    assert min(seconds for seconds, *_ in runs) < 0.3
    assert not any(torch or transformers for _, torch, transformers in runs)


def test_every_public_name_can_be_had_and_no_other():
    for name in gemscope.__all__:
        assert getattr(gemscope, name).__name__ == name
    assert set(dir(gemscope)) == {*gemscope.__all__, "__version__"}


def test_print_lives_in_the_cli_only():
    printing = [
        str(path.relative_to(SRC))
        for path in MODULES
        if path.relative_to(SRC).parts[0] != "cli" and re.search(r"(?<![\w.])print\(", _code_only(path))
    ]
    assert printing == []


def test_no_import_hides_inside_a_function_outside_the_cli():
    hidden = [
        f"{path.relative_to(SRC)}:{inner.lineno}"
        for path in MODULES
        if path.relative_to(SRC).parts[0] != "cli"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert hidden == []


def test_nothing_is_unpickled():
    text = "\n".join(_code_only(path) for path in MODULES)
    assert not re.search(r"\bpickle\b|torch\.load\(|allow_pickle=True", text)


def test_every_package_stands_in_the_floor_table():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"][0]
    floors = set(re.findall(r"\w+", " ".join(table["layers"])))
    packages = {path.parent.name for path in SRC.glob("*/__init__.py")}
    assert packages <= floors


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == gemscope.__version__
    assert f"## {gemscope.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def _code_only(path: Path) -> str:
    """Source without its string constants: generated program text may well print."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)
