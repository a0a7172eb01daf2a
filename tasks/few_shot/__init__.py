"""Few-shot learning: episodes of classes, regression tasks, and the problem posed on them."""
