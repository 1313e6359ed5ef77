"""`cca-bench`: what CCA attention costs on the GPU at hand, beside its dense and sparse peers on the same tensors."""
