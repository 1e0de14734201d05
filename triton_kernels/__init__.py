"""Triton kernels; registers them as `torch.ops.randfuse_triton`. Imported on first use, never by `import randfuse`."""
