"""The command line `sparseflow`: a thin door to `analysis`, `training` and `data`."""
