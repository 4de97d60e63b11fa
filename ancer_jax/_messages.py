"""Parts of error messages."""

import difflib
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if there is none.

    >>> first_line(ValueError("no data\\n  at all")), first_line(AssertionError())
    ('no data', 'AssertionError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def type_and_line(error: BaseException) -> str:
    """The type of an error and the first line of its message, if there is one.

    >>> type_and_line(ValueError("no data")), type_and_line(AssertionError())
    ('ValueError: no data', 'AssertionError')
    """
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if str(error).strip() else line


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message about an unknown name: "; did you mean ...?", or "" if no known one is like it.

    >>> did_you_mean("smal_cnn", ["small_cnn", "cifar_resnet20"])
    "; did you mean 'small_cnn'?"
    """
    near = difflib.get_close_matches(name, [*known], n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
