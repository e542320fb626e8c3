"""What runs inside an engine. Filled by the tiered-offload work."""
