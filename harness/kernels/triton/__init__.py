"""Operations in Triton, one file each. They are imported only where `harness.kernels.device.by_triton` allows it."""
