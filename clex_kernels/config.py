"""ClexConfig: every setting of CLEX and the only place with defaults."""

from dataclasses import dataclass
from typing import Any, Literal

