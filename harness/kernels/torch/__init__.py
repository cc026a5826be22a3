"""Operations in torch for the CPU, one file each. On a GPU, they call the file of the same name in `kernels/triton`."""
