"""`kvindex demo`: the main job in one go, on one machine and without a GPU."""
