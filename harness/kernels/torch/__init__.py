"""Operations in torch for the CPU, one file each; they dispatch to the file of the same name in `kernels/triton`."""
