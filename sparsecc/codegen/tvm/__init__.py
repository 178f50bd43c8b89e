"""The CPU target: TVMScript kernels, compiled by LLVM through TVM."""
