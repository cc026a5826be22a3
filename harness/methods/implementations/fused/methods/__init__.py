"""Methods of `fused`, one file each. A file has `attach`, and subclasses of the reference's layers.

The subclasses override the forward pass. Layer classes are defined at module level, so that a model can be pickled. The
files import torch.
"""
