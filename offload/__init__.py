"""Blocks down and up the tiers below HBM. Filled by the tiered-offload work."""
