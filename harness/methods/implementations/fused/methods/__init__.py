"""Methods of `fused`, one file each. A file has `attach`, and the reference's layers with another forward pass.

The layer classes are defined at module level, so that a model can be pickled. The files import torch.
"""
