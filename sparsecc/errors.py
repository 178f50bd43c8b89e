"""Typed errors. Each message names the weight or argument that is wrong and the way out."""

from __future__ import annotations


class SparseccError(Exception):
    """Base of every error that sparsecc raises on purpose."""


class SpecError(SparseccError, ValueError):
    """A sparsity spec that cannot be read, names nothing, or asks for something impossible."""


class PatternViolation(SparseccError, ValueError):
    """A weight that breaks the pattern its spec names."""


class CaptureError(SparseccError, RuntimeError):
    """A model that cannot be captured as one graph."""


class VerifyError(SparseccError):
    """A program that breaks a rule of its stage: a bug in the pass that ran last."""


class TargetError(SparseccError, ValueError):
    """A dtype, device or architecture that the target cannot serve."""


class ShapeError(SparseccError, ValueError):
    """A tensor whose shape is not the one required, or lies outside the captured range."""


class SelectionError(SparseccError, ValueError):
    """Scores that nothing can be selected by, such as NaN."""


class FormatError(SparseccError, ValueError):
    """A storage format that cannot be read, or cannot hold the given weight."""


class CheckpointError(SparseccError, ValueError):
    """A checkpoint or module that no importer recognises, or that does not fit the model it is to go into."""


class TextError(SparseccError, ValueError):
    """Program text that does not parse.

    `col` counts from 0 and `line` from 1; with `source` (the whole text) the message shows the line and a caret.
    """

    def __init__(self, message: str, source: str = "", col: int = 0, line: int = 1) -> None:
        self.line, self.col = line, col
        lines = source.splitlines()
        if 1 <= line <= len(lines):
            message = f"line {line}, column {col + 1}: {message}\n{caret(lines[line - 1], col)}"
        super().__init__(message)


def caret(text: str, column: int) -> str:
    """`text` and, on the next line, a caret under its `column` (from 0); both indented by four."""
    return f"    {text}\n    {' ' * column}^"
