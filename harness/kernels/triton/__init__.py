"""Our Triton kernels, one file per Operation. Imported only where `harness.kernels.device.by_triton` says so."""
