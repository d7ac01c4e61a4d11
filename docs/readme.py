"""For mkdocs: the site's first page is README.md, so that there is one text and not two."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add index.md."""
    files.append(File.generated(config, "index.md", content=as_index((ROOT / "README.md").read_text("utf-8"))))
    return files


def as_index(text: str) -> str:
    """The README with links as they are from the folder docs; what is not in there is named without a link."""
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?!\w+:)([^)]+)\)", _kept, text)


def _kept(link: re.Match[str]) -> str:
    return link[0] if (ROOT / "docs" / link[2].partition("#")[0]).exists() else link[1]
