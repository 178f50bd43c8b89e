"""Triton kernels for GPUs: sparse linears as readable source, for any device that Triton compiles for."""
