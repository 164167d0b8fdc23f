"""Triton device code and its launchers. Imports torch, triton and itself; knows no names, no autograd, no modules."""
