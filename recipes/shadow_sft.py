"""Shadow-SFT: train BASE on demonstrations, graft the delta onto INSTRUCT, compare.

accelerate launch recipes/shadow_sft.py                                     # the embedded pair, some minutes on a CPU
accelerate launch recipes/shadow_sft.py --config recipes/configs/qwen3-0.6b/sft_lora.yaml --learning_rate 1e-4
"""

import sys
from pathlib import Path

from shadow_trl.recipes.run import main_sft

if __name__ == "__main__":
    sys.exit(main_sft(default_config=Path(__file__).parent / "configs/nano/shadow_sft.yaml"))
