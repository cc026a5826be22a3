"""Operations in torch, one file each. On a GPU, an Operation calls the file of the same name in `kernels/triton`."""
