"""Write the module map of AGENTS.md from the modules' own docstrings, so that it cannot drift.

`python docs/module_map.py` rewrites the part between the two markers; `--check` only compares and exits with 1 when
they differ. It reads source as text and imports nothing of the project.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AGENTS = ROOT / "AGENTS.md"
BEGIN = "<!-- module map: begin (python docs/module_map.py) -->"
END = "<!-- module map: end -->"
ROOMS = ("engine", "workbench", "pages")


def summary(path: Path) -> str:
    """First sentence-like line of the module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = docstring.split("\n\n")[0].replace("\n", " ").strip()
    return first.split(". ")[0].rstrip(".")


def module_map() -> str:
    """The map as a Markdown list, a line a module, folders as headings."""
    lines: list[str] = []
    for room in ROOMS:
        for folder in sorted({p.parent for p in (ROOT / room).rglob("*.py")}):
            lines.append(f"\n**{folder.relative_to(ROOT)}/**\n")
            for path in sorted(folder.glob("*.py")):
                text = summary(path)
                if text:
                    lines.append(f"- `{path.name}`: {text}")
    return "\n".join(lines).strip()


def rewritten(text: str) -> str:
    """`text` with the part between the markers replaced by the map as it is now."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{module_map()}\n{END}{tail}"


def main(argv: list[str]) -> int:
    text = AGENTS.read_text(encoding="utf-8")
    wanted = rewritten(text)
    if "--check" in argv:
        return int(text != wanted)
    AGENTS.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
