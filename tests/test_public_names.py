"""`__all__` names what is there, and the layers import one way."""

from __future__ import annotations

import ast
import pathlib

import kvindex

ROOT = pathlib.Path(kvindex.__file__).parent
ALLOWED = {  # who may import whom, besides itself and kvindex.errors
    "events": {"index.config"},
    "index": {"events", "scoring"},
    "scoring": {"events.model", "index.config", "index.protocol"},
    "simulator": {"events", "index", "scoring", "service"},
    "service": {"events", "index", "scoring", "router.config"},
    "router": {"events", "index", "scoring", "service"},
    "demo": {"service"},
}


def test_exported_names_exist() -> None:
    for name in kvindex.__all__:
        assert hasattr(kvindex, name), name


def imported(path: pathlib.Path) -> set[str]:
    """kvindex modules that a file imports, without the first part."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvindex."):
            found.add(node.module.removeprefix("kvindex."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("kvindex.") for a in node.names if a.name.startswith("kvindex.")}
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for package, others in ALLOWED.items():
        for path in (ROOT / package).rglob("*.py"):
            if "pb" in path.parts:
                continue
            for module in imported(path):
                fits = any(module == ok or module.startswith(f"{ok}.") for ok in {package, "errors", *others})
                if not fits:
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []
