"""Checked, differentiable, backend-independent operations: what `import cmdp_fast as cf` offers."""
