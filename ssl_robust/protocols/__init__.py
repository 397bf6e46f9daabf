"""Ways of evaluating besides the paper's own."""
