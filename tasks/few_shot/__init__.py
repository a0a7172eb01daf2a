"""Few-shot learning: `problem.py` adapts any nn.Module, the other files draw its tasks."""
