"""Imports go down only: no floor imports a floor above it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "lightning_modules": set(),
    "tuning": set(),
    "generators": {"lightning_modules"},
    "fl_ray": {"generators", "lightning_modules", "tuning"},
}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_no_floor_imports_a_floor_above() -> None:
    for floor, allowed in ALLOWED.items():
        files = list((ROOT / floor).rglob("*.py"))
        assert files
        for file in files:
            above = imported(file) & ((set(ALLOWED) | {"experiments", "tests"}) - allowed - {floor})
            assert not above, f"{file} imports {above}"


def test_allocation_needs_no_ray_and_no_torch() -> None:
    for file in (ROOT / "fl_ray" / "allocation").rglob("*.py"):
        assert not imported(file) & {"ray", "torch", "pytorch_lightning"}, file
