"""Operations in Triton, one file each; imported only where `harness.kernels.device.by_triton` allows it."""
