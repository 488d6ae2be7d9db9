"""What follows a run elsewhere as it goes: W&B, TensorBoard, plain CSV files; one file each."""
