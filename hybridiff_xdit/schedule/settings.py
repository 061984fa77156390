"""What a user may set of a policy: one class a policy, from which flags, their help and the README's table are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

#: Refuses a field with a mend: `HybridConfig` gives its own, which names the flag.
Refuse = Callable[[str, str], NoReturn]


def option(help: str, default: Any = None, **flag: Any) -> Any:
    """A field of a settings class that is also the flag ``--hybrid_<field>``.

    Args:
        help: what it means, for ``--help`` and the README.
        default: of the field; a flag that is not given leaves it.
        flag: further arguments of ``ArgumentParser.add_argument``.
    """
    return field(default=default, metadata={"help": help, **flag})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The base: nothing to set. Fields are None where they are not given."""

    @classmethod
    def check(cls, given: Any, refuse: Refuse) -> dict[str, Any]:
        """Check the class's fields of ``given``; the values to take for some that are not given.

        Raises:
            ValueError: (by ``refuse``) one is out of range.
        """
        return {}
