"""Imports run downward only, without circles; those within functions count, those for type checkers alone do not."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "metadiff_cli"
# from the top down: a module imports only from its own room and from rooms of a later line
ROOMS = [
    ["__main__"], ["app"], ["commands", "api"], ["classify", "console"], ["data", "core"], ["config"], ["files"],
    ["errors", "schemas", "_version"],
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def name_of(path: Path) -> str:
    """The dotted name of a module below the package; of a package, that of its folder."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


# the package itself imports the Python class when that is first asked for, and nothing else
MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All import statements, but not those below `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from imports(child)


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found: set[str] = set()
    for node in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name.removeprefix("metadiff_cli.") for name in found} & MODULES.keys()


GRAPH = {name: imported(path) for name, path in MODULES.items()}


@pytest.mark.parametrize("room", LEVEL)
def test_imports_run_downward(room: str) -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if module.split(".")[0] == room and other.split(".")[0] != room and LEVEL[other.split(".")[0]] <= LEVEL[room]
    ]
    assert not upward


def test_there_are_no_circles() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(GRAPH[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in GRAPH:
        if module.split(".")[0] not in ("commands", "app", "__main__"):
            visit(module, ())
