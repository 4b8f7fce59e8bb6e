"""Check the house rules: the length of functions under src/, and of lines of prose in the pages. Exit code 1 if one is broken."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

FUNCTION_MEDIAN, FUNCTION_P90, FUNCTION_MAX = 6, 25, 60
PROSE_COLUMNS = 120
PAGES = ("*.md", ".github/*.md", "docs/*.md")
GENERATED = {"docs/claims.md"}


def main() -> int:
    """Print the problems, or the figures if there are none."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(Path("src").rglob("*.py"))}
    nodes = [(path, node) for path, text in texts.items() for node in ast.walk(ast.parse(text))]
    lengths = {f"{path}:{node.lineno} {node.name}": function_length(node) for path, node in nodes if is_function(node)}
    described = [ast.get_docstring(node) is not None for _, node in nodes if isinstance(node, ast.ClassDef)]
    middle, p90 = median(lengths.values()), quantiles(lengths.values(), n=10)[-1]
    problems = [f"{name}: {length} lines, at most {FUNCTION_MAX}" for name, length in lengths.items() if length > FUNCTION_MAX]
    if middle > FUNCTION_MEDIAN or p90 > FUNCTION_P90:
        problems.append(f"functions: median {middle}, 90th percentile {p90}; at most {FUNCTION_MEDIAN} and {FUNCTION_P90}")
    pages = sorted(page for pattern in PAGES for page in Path().glob(pattern) if str(page) not in GENERATED)
    problems += [problem for page in pages for problem in long_prose(page)]
    figures = (
        f"house rules kept: {len(texts)} files, {sum(len(text.splitlines()) for text in texts.values())} lines;"
        f" {len(lengths)} functions, median {middle}, 90th percentile {p90:.0f}, longest {max(lengths.values())} lines;"
        f" {sum(described) / len(described):.0%} of {len(described)} classes with a docstring"
    )
    print("\n".join(problems) or figures)
    return bool(problems)


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def function_length(node: ast.AST) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    described = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return node.end_lineno - node.lineno + 1 - described


def long_prose(page: Path) -> Iterator[str]:
    """Lines of prose that are too long: not tables, code, formulas, or a word that cannot be broken."""
    in_code = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = line.lstrip().startswith("```")
        in_code ^= fence
        wraps = " " in line.strip()[:PROSE_COLUMNS] and not line.lstrip().startswith(("|", "$$"))
        if len(line) > PROSE_COLUMNS and wraps and not fence and not in_code:
            yield f"{page}:{number}: {len(line)} columns, at most {PROSE_COLUMNS}"


if __name__ == "__main__":
    sys.exit(main())
