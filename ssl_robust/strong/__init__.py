"""Attacks besides the paper's, in the same ball: a file each, whose ATTACKS the YAML list `attacks` chooses from.

All attack the model as it is evaluated, whatever the protocol of the paper's own attacks is.
"""

STEPS = 5  # times the steps of the profile's attack: 100 for the paper's 20, which is what AutoAttack takes
