"""The page that says of every module in one line what it is for: the first paragraphs of their docstrings."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("llama_lab", "benchmarks")


def modules_table() -> str:
    """A table a folder, by name; what has no docstring is left out."""
    folders = [folder for package in PACKAGES for folder in sorted({p.parent for p in (ROOT / package).rglob("*.py")})]
    return "\n".join(filter(None, map(_table, folders)))


def _table(folder: Path) -> str:
    told = {path.name: said for path in sorted(folder.glob("*.py")) if (said := _first_paragraph(path))}
    own = told.pop("__init__.py", "")
    if not told:
        return ""
    lines = [
        f"## {folder.relative_to(ROOT).as_posix()}/",
        "",
        *([own, ""] if own else []),
        "| module | what it is for |",
    ]
    lines += ["|---|---|", *(f"| `{name}` | {said} |" for name, said in told.items()), ""]
    return "\n".join(lines)


def _first_paragraph(path: Path) -> str:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return said.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
