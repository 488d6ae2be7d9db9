"""What a request offers to methods and regularizers: weights, other names, images, text vectors."""
