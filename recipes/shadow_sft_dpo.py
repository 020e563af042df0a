"""Shadow-SFT on BASE, then Shadow-DPO from its folder; the graft onto INSTRUCT carries both deltas.

accelerate launch recipes/shadow_sft_dpo.py                                 # the embedded pair, some minutes on a CPU
accelerate launch recipes/shadow_sft_dpo.py --config recipes/configs/pipelines/qwen3-0.6b.yaml --output_dir out
"""

import sys
from pathlib import Path

from shadow_trl.recipes.pipeline import main_sft_dpo

if __name__ == "__main__":
    sys.exit(main_sft_dpo(default_config=Path(__file__).parent / "configs/nano/shadow_sft_dpo.yaml"))
