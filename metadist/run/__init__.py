"""The run folder: storage, checkpoints, events, TensorBoard, status."""
