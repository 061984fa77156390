"""The rules by name."""

from .base import Rule
from .deferred import Deferred
from .published import Mixed, NoGuidance
from .reuse import Reuse

#: Guidance rules by name. An instance belongs to one run.
RULES: dict[str, type[Rule]] = {"mixed": Mixed, "none": NoGuidance, "reuse": Reuse, "deferred": Deferred}
