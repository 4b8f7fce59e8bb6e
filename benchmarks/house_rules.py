"""Check the house rules on the length of functions. Exit code 1 if one is broken."""

import ast
import sys
from pathlib import Path
from statistics import median, quantiles

FUNCTION_MEDIAN, FUNCTION_P90, FUNCTION_MAX = 6, 25, 60


def main() -> int:
    """Check every module under src/."""
    lengths: dict[str, int] = {}
    problems: list[str] = []
    for path in sorted(Path("src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
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


if __name__ == "__main__":
    sys.exit(main())
