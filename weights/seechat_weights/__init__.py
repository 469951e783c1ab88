"""What checkpoints and bundles are: formats, names, precisions. Needs no torch."""
