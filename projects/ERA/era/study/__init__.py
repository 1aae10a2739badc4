"""Studies: variants from several seeds, compared."""
