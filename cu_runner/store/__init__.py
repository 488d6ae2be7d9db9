"""Files that survive a kill: run directories, caches, checkpoints; written whole, read checked."""
