"""Our own Triton kernels as torch operators. Each file imports Triton, so import it only where Triton is."""
