"""The module list of docs/architecture.md, made from the modules' own first lines.

python tests/docs/module_list.py    writes it into the document
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "architecture.md"
PACKAGES = ("kvcache", "partition", "giantserve", "deployments")
BEGIN = "<!-- modules: begin (python tests/docs/module_list.py writes this) -->"
END = "<!-- modules: end -->"


def module_list() -> str:
    """Every module by folder, each with the first sentence of its docstring."""
    lines: list[str] = []
    for package in PACKAGES:
        folder = ""
        for path in sorted((ROOT / package).rglob("*.py"), key=_by_folder):
            if path.name == "__init__.py":
                continue
            here = str(path.parent.relative_to(ROOT))
            if here != folder:
                folder = here
                lines += ["", f"**{folder}/**", ""]
            lines.append(f"- `{path.name}`: {first_line(path)}")
    return "\n".join(lines).strip()


def first_line(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line. Raises ValueError without one."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    if not text:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring; say in a line what it holds")
    return " ".join(text.split("\n\n")[0].split())


def written_list() -> str:
    """What stands in the document now."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip()


def write() -> None:
    """Bring the document up to date."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{module_list()}\n\n{END}{after}")


def _by_folder(path: Path) -> tuple[str, str]:
    return str(path.parent), path.name


if __name__ == "__main__":
    write()
