"""Methods of `fused`, one file each: the reference's layers with another forward pass, and `attach`.

The layers are classes of modules, so that a model can be pickled. The files import torch.
"""
