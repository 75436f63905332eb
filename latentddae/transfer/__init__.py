"""Transfer: how good are the features of a pretrained network? Probes, grids, controls and the
report."""
