"""Whether the numbers can be trusted: health of attacks, sanity checks, paired comparisons, the paper's claims."""
