"""Kernels for CUDA, written in Triton. Imported where they run: the rest of ``kernels`` does without Triton."""
