"""One-line errors that say what to do."""

import difflib
from collections.abc import Iterable


class BookError(ValueError):
    """Something the reader can put right. The message is one line: what is wrong, where, what to do."""

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of the stack, so that a chapter's error stays one line."""
        return [f"{type(self).__name__}: {self}"]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> BookError:
    """The error for a name that is not in `known`, with the nearest one as a suggestion."""
    known = sorted(known)
    lowered = {option.lower(): option for option in known}
    near = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.5)
    hint = f"Did you mean {lowered[near[0]]!r}?" if near else f"Choose one of: {', '.join(known)}."
    return BookError(f"There is no {kind} {name!r}. {hint}")


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise `unknown_name` for a name that is not in `known`."""
    if name not in known:
        raise unknown_name(kind, name, known)


def check_texts(texts: list[str], where: str) -> None:
    """Raise BookError for the first text that is none or empty."""
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise BookError(f"{where}, row {row}: the text is {text!r}. Drop the row or give it a text.")
