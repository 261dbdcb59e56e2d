"""Sizes of a TPU core, shared by the kernels and by arrays that are laid out for it."""

LANES = 128  # columns of a vector register and of a memory tile
VMEM_BYTES = 64 * 2**20  # vector memory of a v5p and its successors; the compiler's default is 16
