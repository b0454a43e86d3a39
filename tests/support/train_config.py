"""A training as a program, for tests that kill it: python -m tests.support.train_config CONFIG.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trainer_core.config import TrainConfig, from_json
from trainer_core.run import train_lora

if __name__ == "__main__":
    train_lora(from_json(TrainConfig, json.loads(Path(sys.argv[1]).read_text())))
