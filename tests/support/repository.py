"""Where the repository is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPARISONS = sorted((ROOT / "recipes/configs/compare").glob("*.yaml"))
TRAININGS = sorted({*(ROOT / "recipes/configs").rglob("*.yaml")} - {*COMPARISONS})
"""The configs of a comparison, and those of a recipe or pipeline."""
