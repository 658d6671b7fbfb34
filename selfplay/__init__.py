"""The loop around the search library: play, learn, evaluate, checkpoint, and round again."""
