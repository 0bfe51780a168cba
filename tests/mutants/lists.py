"""All mutants."""

from .gradients import GRADIENTS
from .offsets import OFFSETS
from .rotations import ROTATIONS
from .rules import RULES
from .splits import SPLITS
from .tables import TABLES_AND_CACHE
from .tails import TAILS

MUTANTS = [*ROTATIONS, *OFFSETS, *GRADIENTS, *RULES, *TABLES_AND_CACHE, *TAILS, *SPLITS]
