"""The layers that `fused` puts in the place of the reference's: the same state, computed by `harness.kernels`.

Classes of a module, so that a model can be pickled; beside the files that name them, which do not import torch.
"""
