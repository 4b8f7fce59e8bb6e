"""Counts what the house rules limit: the length of files and functions, and public names per module. Exit code 1 if one is broken."""

import ast
import sys
from pathlib import Path
from statistics import median, quantiles

FILE_LINES, FUNCTION_MEDIAN, FUNCTION_P90, FUNCTION_MAX, PUBLIC_NAMES = 300, 6, 25, 60, 7


def main() -> int:
    """Check every module under src/."""
    lengths: dict[str, int] = {}
    problems: list[str] = []
    for path in sorted(Path("src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if text.count("\n") > FILE_LINES:
            problems.append(f"{path}: {text.count(chr(10))} lines, at most {FILE_LINES}")
        if path.name != "__init__.py" and (names := public_names(tree)) > PUBLIC_NAMES:
            problems.append(f"{path}: {names} public names, at most {PUBLIC_NAMES}")
        lengths |= {f"{path}:{node.lineno} {node.name}": function_length(node) for node in ast.walk(tree) if is_function(node)}
    problems += [f"{name}: {length} lines, at most {FUNCTION_MAX}" for name, length in lengths.items() if length > FUNCTION_MAX]
    middle, p90 = median(lengths.values()), quantiles(lengths.values(), n=10)[-1]
    if middle > FUNCTION_MEDIAN or p90 > FUNCTION_P90:
        problems.append(f"functions: median {middle}, 90th percentile {p90}; at most {FUNCTION_MEDIAN} and {FUNCTION_P90}")
    print(
        "\n".join(problems) or f"house rules kept: {len(lengths)} functions, median {middle}, 90th percentile {p90:.0f} lines"
    )
    return bool(problems)


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def function_length(node: ast.AST) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    described = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return node.end_lineno - node.lineno + 1 - described


def public_names(tree: ast.Module) -> int:
    """Classes and functions that do not begin with an underscore."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return sum(isinstance(node, kinds) and not node.name.startswith("_") for node in tree.body)


if __name__ == "__main__":
    sys.exit(main())
