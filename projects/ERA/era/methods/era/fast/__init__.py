"""ERA's losses made cheap: the same numbers as the readable definition, to rounding."""
