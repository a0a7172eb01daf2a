"""Text classification with a regularisation strength for each feature."""
