"""Shadow-DPO: train BASE on preferences, graft the delta onto INSTRUCT, compare.

accelerate launch recipes/shadow_dpo.py                                     # the embedded pair, some minutes on a CPU
accelerate launch recipes/shadow_dpo.py --config recipes/configs/qwen3-0.6b/dpo_lora.yaml --learning_rate 1e-5
"""

import sys
from pathlib import Path

from shadow_trl.recipes.run import main_dpo

if __name__ == "__main__":
    sys.exit(main_dpo(default_config=Path(__file__).parent / "configs/nano/shadow_dpo.yaml"))
