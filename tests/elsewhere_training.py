"""train_gpt2_mod.py, whose rank 1 stands in another folder: what is named relatively is not there for it alone."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_mod

if os.environ.get("RANK") == "1":
    os.chdir(os.environ.get("ELSEWHERE") or tempfile.mkdtemp())
sys.exit(train_gpt2_mod.main(sys.argv[1:]))
