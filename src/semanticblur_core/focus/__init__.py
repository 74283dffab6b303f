"""Focus quality: scores, classical blur maps, stacks, reports and calibrated gates."""
