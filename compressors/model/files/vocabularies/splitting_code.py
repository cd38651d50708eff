"""Reads from a tokenizer's Python code by which expression it cuts text. The code is parsed and never run."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from compressors.model.errors import InputError
from compressors.model.files.raw_file import RawFile

__all__ = ["SplittingCode", "read_splitting_code"]

_LARGEST = 1_000_000  # bytes; such files have about 15 thousand
_NAME = "pat_str"


@dataclass(frozen=True)
class SplittingCode:
    """The facts in the code.

    Attributes:
        expression: the expression by which text is cut into words.
        composes: True if the code brings text into Unicode's normal form C first.
        texts: the texts that the code names, special tokens among them.
    """

    expression: str
    composes: bool
    texts: frozenset[str]


def read_splitting_code(path: Path) -> SplittingCode:
    """Reads the file in which a tokenizer's class is defined.

    Raises:
        InputError: the file is missing or is no Python, or no expression is found in it.
    """
    file = RawFile(path)
    if file.size > _LARGEST:
        raise InputError(f"{path} has {file.size:,} bytes, too many for the code of a tokenizer: download it again")
    try:
        tree = ast.parse(file.start(_LARGEST).decode("utf-8"))
        nodes = list(ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path} cannot be read as Python ({type(error).__name__}): download it again") from None
    expression = next((text for node in nodes if (text := _assigned_expression(node)) is not None), None)
    if expression is None:
        raise InputError(
            f"{path} assigns no text to {_NAME}, so it is not known how it cuts text into words; make a tokenizer.json "
            "with this code where you trust it"
        )
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return SplittingCode(expression, any(map(_composes, nodes)), frozenset(texts))


def _assigned_expression(node: ast.AST) -> str | None:
    """The text that a statement assigns to the name of the expression; None if it assigns none."""
    if not isinstance(node, ast.Assign):
        return None
    names = [target.id.lower() for target in node.targets if isinstance(target, ast.Name)]
    return _text(node.value) if _NAME in names else None


def _text(node: ast.expr) -> str | None:
    """The value of an expression that only puts texts together; None for any other."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        between, parts = _text(node.func.value), node.args[0] if len(node.args) == 1 else None
        texts = [_text(part) for part in parts.elts] if isinstance(parts, ast.List | ast.Tuple) else [None]
        known = [text for text in texts if text is not None]
        return between.join(known) if between is not None and len(known) == len(texts) else None
    return None


def _composes(node: ast.AST) -> bool:
    """True for a call like ``unicodedata.normalize("NFC", text)``."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "normalize"
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == "NFC"
    )
