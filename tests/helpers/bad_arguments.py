"""Tables of what is refused: a call, its exception, and words of the message, which name the argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

Refused = tuple[Callable[[], Any], type[Exception] | tuple[type[Exception], ...], str]


def refused(rows: Mapping[str, Refused] | Sequence[Refused]) -> Any:
    """Return a test of every row; a mapping names them."""
    names, listed = (list(rows), list(rows.values())) if isinstance(rows, Mapping) else (None, rows)

    @pytest.mark.parametrize(("call", "error", "words"), listed, ids=names)
    def test(call: Callable[[], Any], error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            call()

    return test
