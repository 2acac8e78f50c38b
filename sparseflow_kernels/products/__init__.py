"""Products with the weights of one sparse layer, behind `SparseLinear`."""
