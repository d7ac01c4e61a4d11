"""docs/troubleshooting.md has a row for every line that a training can say, and quotes none that it cannot."""

from __future__ import annotations

import ast
import re

from tests.harness import ROOT, SCRIPT

PAGE = ROOT / "docs/troubleshooting.md"
PACKAGE = ROOT / "unbroken"
# What the tools say of their own arguments explains itself; write_plan.py's and transaction.py's are invariants.
OTHERS = (
    "commands",
    "families.py",
    "huggingface.py",
    "arcee.py",
    "inference.py",
    "dcp_reader.py",  # of `import`
    "library.py",  # docs/checkpoint-library.md lists its exceptions
    "__main__.py",
    "write_plan.py",
    "transaction.py",
)
TRAINING = [SCRIPT, *(path for path in sorted(PACKAGE.rglob("*.py")) if not {*path.parts} & {*OTHERS})]
RAISED = ("UserError", "ValueError", "warn")
SAID = (".warn", "warnings.append")
LEAST_LETTERS = 6  # of a text of which something can be looked up


def template(node: ast.AST) -> str:
    """The text of an expression, `…` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("`", "")
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(map(template, node.values))).replace("`", "")
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def messages() -> dict[str, str]:
    """Each line that a training can say -> where."""
    found = {}
    for path in TRAINING:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = ast.unparse(node.func)
            if name in RAISED or name.endswith(SAID):
                text = template(node.args[0])
                if len(re.sub(r"[\W…]", "", text)) >= LEAST_LETTERS:
                    found[text] = f"{path.name}:{node.lineno}"
    return found


def quotes() -> list[str]:
    """What the first columns quote."""
    rows = re.findall(r"^\| (.*?) \| ", PAGE.read_text("utf-8"), re.M)
    return [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]


def covers(quote: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, quote.removeprefix("WARNING: ").split("…"))))


def test_every_line_has_a_row() -> None:
    said = messages()
    assert len(said) > 150, "the messages are not found any more"
    patterns = [covers(quote) for quote in quotes() if len(re.sub(r"[\W…]", "", quote)) >= 4]
    silent = {where: text for text, where in said.items() if not any(each.search(text) for each in patterns)}
    assert silent == {}, "docs/troubleshooting.md says nothing of these"


def test_every_quote_is_said_by_something() -> None:
    texts = set()
    for path in [SCRIPT, *PACKAGE.rglob("*.py")]:
        texts |= {template(node) for node in ast.walk(ast.parse(path.read_text("utf-8")))}
    stale = [quote for quote in quotes() if not any(covers(quote).search(text) for text in texts)]
    assert stale == []


def test_the_page_could_miss_one() -> None:
    assert not covers("run … exists already").search("run … is being trained")
    assert covers("run … exists already").search("run … exists already; continue it with …")
