"""How good rankings are, and whether they differ: metrics by ranx, paired significance tests."""
