"""Operations in torch, one file each. On a GPU, most call the file of the same name in `kernels/triton`."""
