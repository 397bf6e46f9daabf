"""Weight files of others, and encoders that are Python callables."""
