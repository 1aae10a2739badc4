"""Training and evaluation, from the command line down to a step."""
