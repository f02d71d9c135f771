"""Tributary: tensor-parallel inference for Llama-family models with pluggable, exact shared-prefix attention."""
