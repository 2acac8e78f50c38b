"""Solving dy/dt = f(t, y) for any f on torch tensors. Knows no fields and no engines, and imports nothing of ours."""
