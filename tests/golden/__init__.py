"""Where the figures of the authors' model are."""

import os
from pathlib import Path

DIRECTORY = Path(os.environ.get("PRORES_GOLDEN_DIR", Path(__file__).parent))
