from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_prores.config.flags import told_in_flags
from megatron_prores.errors import UserError


def complaint_of(function: Callable[..., object], *args: object) -> str:
    """What a user reads when ``function(*args)`` refuses: one line that names the flag."""
    with pytest.raises(UserError) as error, told_in_flags():
        function(*args)
    words = error.value.message()
    assert words.startswith("--prores-")
    assert "\n" not in words
    return words
