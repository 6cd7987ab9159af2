"""The benchmark's modules import each other by name, as scripts do; its tests import them the same way."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
