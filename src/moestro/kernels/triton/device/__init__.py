"""Device code alone: what is compiled for a GPU, and what the digest of these kernels is made of."""
