"""Imports run one way: api -> assembly -> drivers -> training -> methods, evaluation -> models, data -> the rest."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# comparison reads run folders and nothing else of the package but layer 0
LAYERS = {
    "__main__": 6,
    "api": 6,
    "assembly": 5,
    "drivers": 4,
    "training": 3,
    "methods": 2,
    "evaluation": 2,
    "models": 1,
    "data": 1,
    "comparison": 1,
}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("unlearn_runner.")}


def layer(module: str) -> tuple[int, str]:
    part = module.split(".")[1]
    return LAYERS.get(part, 0), part


def test_imports_point_one_way():
    files = sorted((ROOT / "unlearn_runner").rglob("*.py"))
    assert len(files) > 20
    wrong = []
    for file in files:
        here, own = layer(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for name in imported(file):
            there, other = layer(name)
            if there > here or (there == here and other != own and there > 0):
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_methods_and_evaluation_know_nothing_of_configuration():
    for file in (ROOT / "unlearn_runner").rglob("*.py"):
        if file.name not in ("__main__.py", "cli.py", "trust.py"):
            assert "omegaconf" not in file.read_text(), f"{file}: cfg stays in assembly.py"


def test_comparing_loads_no_torch():
    """A table of hundreds of runs is there before torch would be."""
    code = "import sys, compare, unlearn_runner.comparison.report; sys.exit('torch' in sys.modules)"
    folders = {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    done = subprocess.run([sys.executable, "-c", code], env=folders, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_name_is_undefined():
    """Shapes of arrays are strings that are not Python, so the linter's rule is off; those are in small letters."""
    rule = ["check", "--isolated", "--select=F821", "--output-format=concise", "unlearn_runner", "scripts"]
    done = subprocess.run([sys.executable, "-m", "ruff", *rule], cwd=ROOT, capture_output=True, text=True)
    assert "F821" in done.stdout, done.stderr
    assert not re.findall(r"^.*Undefined name `[A-Z]\w.*$", done.stdout, re.MULTILINE)
