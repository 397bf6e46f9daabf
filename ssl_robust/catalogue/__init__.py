"""Data sets in their official layouts, a file each; who adds one adds a file with its entry in DATASETS."""
