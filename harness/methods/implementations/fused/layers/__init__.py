"""Layers of `fused`: the state of the reference's layers, computed by `harness.kernels`.

They are classes of modules, so that a model can be pickled. The files above do not import torch.
"""
