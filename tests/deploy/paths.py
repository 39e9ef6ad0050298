"""Where the quickstart's parts lie; importing this makes them importable."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "deploy" / "quickstart.d"
sys.path.insert(0, str(PARTS))
sys.path.insert(0, str(ROOT / "tests" / "worker" / "python"))
