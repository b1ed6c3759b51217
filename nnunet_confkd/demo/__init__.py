"""The main job on generated or public data, for a first try."""
